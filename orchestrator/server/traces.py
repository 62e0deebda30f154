"""Traces for a collector of OpenTelemetry: a span of each HTTP request, and each query that ended as its own trace.

Made of what is on record already and sent in the background: nothing waits for a collector, and what one does not take
in time is lost, counted, and told once a minute. No span has a text of a query, a path or a query string. What a client
says of a trace of its own (`traceparent`) is not taken: it could keep its requests out of ours, or put them into one of
somebody else's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanKind, Status, StatusCode

from orchestrator.core.address import shown
from orchestrator.core.errors import AirlockError
from orchestrator.core.events import Recorded
from orchestrator.exports.otlp import address_of, send
from orchestrator.exports.records import VERSION
from orchestrator.server.problems import is_fault

MOST_WAITING = 1000  # queries whose traces are yet to be sent
CLOSE_S = 5.0  # for what waits when the service ends
QUIET_S = 60.0  # between two lines in the log on a collector that fails
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})  # nobody traces these

_log = logging.getLogger("airlock.traces")


class Traces:
    """endpoint: of the collector, for traces. history: a query's records; those of one that is not closed are not sent.

    counted: told `sent`, `failed` or `dropped` for each query. Raises RequestError where the endpoint is no address.
    """

    def __init__(
        self, endpoint: str, history: Callable[[str], Sequence[Recorded]], counted: Callable[[str], None]
    ) -> None:
        self._endpoint, self._history, self._counted = address_of(endpoint), history, counted
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource({"service.name": "airlock", "service.version": VERSION}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(self._endpoint)))
        self._tracer = self._provider.get_tracer("airlock", VERSION)
        self._queries: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._told = -QUIET_S
        self._thread = threading.Thread(target=self._serve, name="airlock-traces", daemon=True)
        self._thread.start()

    def query(self, query: str) -> None:
        """It has ended, and that is committed."""
        try:
            self._queries.put_nowait(query)
        except queue.Full:
            self._counted("dropped")

    def request(self, fields: Mapping[str, Any], began_ns: int) -> None:
        """One that has just ended. fields: those of its line in the log."""
        if fields["route"] in PROBES:
            return
        attributes = {
            "http.request.method": fields["method"],
            "http.route": fields["route"],
            "http.response.status_code": fields["status"],
            "airlock.request_id": fields["request_id"],
            "airlock.problem": fields["problem"],
            "airlock.tenant": fields["tenant"],
            "airlock.query": fields["query"],
        }
        failed = is_fault(fields["status"], fields["problem"])
        span = self._tracer.start_span(
            f"{fields['method']} {fields['route']}",
            Context(),
            SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None}
            | ({"error.type": str(fields["status"])} if failed else {}),
            start_time=began_ns,
        )
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(max(began_ns, time.time_ns()))

    def close(self) -> None:
        """Send what waits, as far as there is time. Blocks, for CLOSE_S at most."""
        until = time.monotonic() + CLOSE_S
        closing = threading.Thread(target=self._provider.shutdown, name="airlock-spans", daemon=True)
        closing.start()
        with suppress(queue.Full):
            self._queries.put(None, timeout=CLOSE_S)
        for thread in (self._thread, closing):
            thread.join(max(0.0, until - time.monotonic()))

    def _serve(self) -> None:
        while (query := self._queries.get()) is not None:
            try:
                history = self._history(query)
                if history and history[-1].type == "query.closed":
                    send([history], self._endpoint)
                    self._counted("sent")
            except Exception as error:  # whatever it is: the next query's trace is not to be lost with this one's
                self._counted("failed")
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        if time.monotonic() < self._told + QUIET_S:
            return
        self._told = time.monotonic()
        why = str(error).replace(self._endpoint, shown(self._endpoint)) if isinstance(error, AirlockError) else ""
        _log.warning("traces are lost: %s", why or type(error).__name__)
