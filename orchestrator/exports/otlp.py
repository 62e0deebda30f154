"""The spans of queries as OTLP: lines of JSON, as the file exporter of OpenTelemetry writes, or to a collector."""

from __future__ import annotations

import base64
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from orchestrator.core.errors import RequestError
from orchestrator.core.events import Recorded
from orchestrator.exports.records import line
from orchestrator.exports.spans import spans

MOST_SPANS = 500  # of a line, or a request
MOST_BYTES = 4 << 20  # likewise, unless one span alone has more: collectors take 20 MiB at most


def lines(history: Sequence[Recorded], *, content: bool = False) -> Iterator[str]:
    """One ExportTraceServiceRequest a line. content: with the texts."""
    for _, request in _batches(spans(history, content=content)):
        fields: dict[str, Any] = MessageToDict(request, use_integers_for_enums=True)
        for span in fields["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            # OTLP has ids in hexadecimal where JSON of other protocol buffers has base64.
            for name in {"traceId", "spanId", "parentSpanId"} & span.keys():
                span[name] = base64.b64decode(span[name]).hex()
        yield line(fields)


def send(histories: Iterable[Sequence[Recorded]], endpoint: str, *, content: bool = False) -> int:
    """To a collector over OTLP/HTTP; how many spans it took. Raises RequestError.

    Headers, certificates and time-outs are the exporter's: OTEL_EXPORTER_OTLP_HEADERS and its like.
    """
    sent = 0
    exporter = OTLPSpanExporter(address_of(endpoint))
    try:
        for history in histories:
            for batch, _ in _batches(spans(history, content=content)):
                with _heard() as said:
                    taken = exporter.export(batch) is SpanExportResult.SUCCESS
                if not taken:
                    why = said[0] if said else "it does not say why"
                    raise RequestError(f"{endpoint} did not take the spans: {why}; {sent} were sent before")
                sent += len(batch)
    finally:
        exporter.shutdown()
    return sent


def address_of(endpoint: str) -> str:
    """With the path for traces, where only the collector is named."""
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good, parts = False, None
    if not good or parts is None:
        raise RequestError(f"the endpoint has to be an address such as http://127.0.0.1:4318, not {endpoint!r}")
    return endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"


@contextmanager
def _heard() -> Generator[list[str]]:
    """What the exporter logs: it tells in no other way why it failed."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(" ".join(record.getMessage().split())[:500])

    logger, ear = logging.getLogger(OTLPSpanExporter.__module__), Ear()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(ear)
    try:
        yield said
    finally:
        logger.removeHandler(ear)
        logger.propagate = before


def _batches(found: Sequence[ReadableSpan]) -> Iterator[tuple[list[ReadableSpan], ExportTraceServiceRequest]]:
    """Spans that go together, and the request that they are."""
    batch: list[ReadableSpan] = []
    request = ExportTraceServiceRequest()
    room = MOST_BYTES
    for span in found:
        one = encode_spans([span])
        size = one.ByteSize()
        if batch and (size > room or len(batch) == MOST_SPANS):
            yield batch, request
            batch, room = [], MOST_BYTES
        if batch:  # of the same resource and scope as all of them
            request.resource_spans[0].scope_spans[0].spans.extend(one.resource_spans[0].scope_spans[0].spans)
        else:
            request = one
        batch.append(span)
        room -= size
    if batch:
        yield batch, request
