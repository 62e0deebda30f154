"""What the service does, in numbers, for Prometheus: fed by the events of queries that run here, and by requests.

No label names a tenant, a query or a model, nor has one a value that somebody outside can choose: a series that
is made once stays until the process ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from orchestrator.core.events import Event
from orchestrator.exports.records import number, text
from orchestrator.loop.engine import Status

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"  # whatever a label has no value for
_STATUS = frozenset(get_args(Status))
_ROLES, _STARTS = frozenset({"root", "sub"}), frozenset({"cold", "warm"})
_OUTCOMES = frozenset({"answered", "void", "unknown"})
_NOTHING = Decimal(0)
_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LM_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_QUERY_S = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

Number = Callable[[], float]


@dataclass(slots=True)
class _Open:
    """A query that runs. whole: it began here, too. asked: call -> its role, and when it was sent. cost: so far."""

    whole: bool
    asked: dict[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])
    cost: Decimal = _NOTHING


class Metrics:
    """All of the service's. Any thread may call `text` and `traces`; the rest is the event loop's."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._open: dict[str, _Open] = {}
        ProcessCollector(registry=registry)
        Info("airlock_build", "The version that runs.", registry=registry).info({"version": version("airlock")})
        self._queries = Counter(
            "airlock_queries", "Queries that ended, by how; interrupted ones may go on.", ["status"], registry=registry
        )
        self._query_s = Histogram("airlock_query_seconds", "How long queries ran.", buckets=_QUERY_S, registry=registry)
        self._running = Gauge("airlock_queries_running", "Queries that run now.", registry=registry)
        self._waiting = Gauge("airlock_queue_waiting", "Queries that wait for their turn.", registry=registry)
        self._sub_calls = Counter(
            "airlock_sub_calls",
            "Sub-calls: attempts by their outcome; refused before they were sent; repeated: answered by one like them.",
            ["outcome"],
            registry=registry,
        )
        self._lm_s = Histogram(
            "airlock_lm_request_seconds",
            "How long LM requests took.",
            ["role"],
            buckets=_LM_S,
            registry=registry,
        )
        self._spent = Counter("airlock_spent_usd", "USD that LM requests have cost.", registry=registry)
        self._sandboxes = Counter(
            "airlock_sandboxes_started", "Sandboxes that queries were given.", ["start"], registry=registry
        )
        self._ready = Gauge("airlock_pool_ready", "Sandboxes that are kept ready.", registry=registry)
        self._refused = Counter(
            "airlock_refused",
            "What was refused, by kind: requests over HTTP, queries at a limit, sub-calls.",
            ["what", "kind"],
            registry=registry,
        )
        self._requests = Counter(
            "airlock_http_requests", "HTTP requests that ended.", ["method", "route", "status"], registry=registry
        )
        self._faults = Counter(
            "airlock_http_faults",
            "HTTP requests that ended in what is for the operator to look into: server errors that are no refusals.",
            registry=registry,
        )
        self._request_s = Histogram(
            "airlock_http_request_seconds",
            "How long HTTP requests took, to the last byte; event streams are not among them.",
            ["route"],
            buckets=_REQUEST_S,
            registry=registry,
        )
        self.streams = Gauge("airlock_event_streams", "Event streams that are open.", registry=registry)
        self._traces = Counter(
            "airlock_traces", "Traces of queries, by what became of them.", ["outcome"], registry=registry
        )
        for outcome in (*_OUTCOMES, "refused", "repeated"):  # a rate needs a zero to begin with
            self._sub_calls.labels(outcome)
        for status in _STATUS:
            self._queries.labels(status)

    def watch(self, *, running: Number, waiting: Number, pool: Number) -> None:
        """What is not counted but looked up, whenever somebody asks: queries that run and wait, and sandboxes ready."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._ready.set_function(pool)

    def event(self, event: Event, query: str) -> None:
        """What happens in a query that runs here."""
        body = event.body
        match event.type:
            case "query.opened" | "query.resumed":
                self._open[query] = _Open(whole=event.type == "query.opened")
            case "query.closed":
                self._queries.labels(_one_of(body, "status", _STATUS)).inc()
                if "duration_ms" in body:  # it had its turn
                    self._query_s.observe(number(body, "duration_ms") / 1000)
                self._close(query, _usd(body))
            case "query.interrupted":
                self._queries.labels("interrupted").inc()
                self._close(query)
            case "call.intent" | "call.result" | "call.refused" | "call.repeated":
                self._call(event, self._open.get(query, _Open(whole=False)))
            case "limit.hit":
                self.refused("query", text(body, "kind"))
            case "sandbox.started":
                self._sandboxes.labels(_one_of(body, "start", _STARTS)).inc()
            case _:
                pass

    def _call(self, event: Event, of: _Open) -> None:
        body = event.body
        call, role = text(body, "call"), _one_of(body, "role", _ROLES)
        match event.type:
            case "call.intent":
                of.asked[call] = role, time.monotonic()
            case "call.result":
                of.cost += _usd(body)
                self._spent.inc(float(_usd(body)))
                role, since = of.asked.pop(call, (OTHER, time.monotonic()))
                self._lm_s.labels(role).observe(time.monotonic() - since)
                if role == "sub":
                    self._sub_calls.labels(_one_of(body, "outcome", _OUTCOMES)).inc()
            case "call.refused":
                self.refused("call", text(body, "kind"))
                if role == "sub":
                    self._sub_calls.labels("refused").inc()
            case _:
                self._sub_calls.labels("repeated").inc()

    def _close(self, query: str, cost: Decimal = _NOTHING) -> None:
        """cost: in all. What no result told of was charged when the query was settled: its result was lost."""
        of = self._open.pop(query, None)
        if of and of.whole:  # else other processes have counted some of it
            self._spent.inc(float(max(_NOTHING, cost - of.cost)))

    def ended(self, query: str) -> None:
        """Nothing more will come of it, even where its end could not be recorded."""
        self._open.pop(query, None)

    def refused(self, what: str, kind: str) -> None:
        """what: request, query, call. kind: of the error or problem, which our code names and nobody else."""
        self._refused.labels(what, kind).inc()

    def traces(self, outcome: str, count: int = 1) -> None:
        """outcome: sent, failed, dropped."""
        self._traces.labels(outcome).inc(count)

    def request(
        self, method: str, route: str, status: int, seconds: float, *, stream: bool = False, fault: bool = False
    ) -> None:
        """route: as it is declared. How long a stream was open tells nothing of how fast the service is."""
        self._requests.labels(method if method in METHODS else OTHER, route, str(status)).inc()
        if fault:
            self._faults.inc()
        if not stream:
            self._request_s.labels(route).observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and the media type of that."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


def _one_of(body: Mapping[str, Any], name: str, known: frozenset[str]) -> str:
    value = text(body, name)
    return value if value in known else OTHER


def _usd(body: Mapping[str, Any]) -> Decimal:
    try:
        usd = Decimal(text(body, "cost_usd") or "0")
    except InvalidOperation:
        return _NOTHING
    return usd if usd.is_finite() else _NOTHING
