"""What the service counts: against the journal of real queries, and with labels that nobody outside can choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import zip_longest

from hypothesis import given

from orchestrator.core.events import Event, Recorded
from orchestrator.server.metrics import Metrics
from tests.unit.exported import Ran, histories
from tests.unit.helpers import quick


def told(metrics: Metrics, *queries: list[Recorded]) -> Metrics:
    """All events of these queries, one of each in turn, as if they ran at the same time."""
    for row in zip_longest(*queries):
        for record in row:
            if record:
                metrics.event(Event(record.type, record.node, record.body), record.query)  # type: ignore[arg-type]
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def of(history: list[Recorded], kind: str) -> Iterator[Recorded]:
    return (record for record in history if record.type == kind)


def test_what_is_counted_is_what_the_journal_has(exported: dict[str, Ran]):
    voyage, endless = exported["voyage"].history, exported["endless"].history
    metrics = told(Metrics(), voyage, endless)
    both = [*voyage, *endless]
    for status, count in Counter(record.body["status"] for record in of(both, "query.closed")).items():
        assert value(metrics, "airlock_queries_total", status=status) == count
    cost = sum(Decimal(record.body["cost_usd"]) for record in of(both, "query.closed"))
    assert Decimal(repr(value(metrics, "airlock_spent_usd_total"))).quantize(Decimal("1e-9")) == cost > 0
    starts = Counter(record.body["start"] for record in of(both, "sandbox.started"))
    assert {s: value(metrics, "airlock_sandboxes_started_total", start=s) for s in starts} == starts
    assert value(metrics, "airlock_query_seconds_count") == 2
    ran = sum(record.body["duration_ms"] for record in of(both, "query.closed"))
    assert round(value(metrics, "airlock_query_seconds_sum") * 1000) == ran


def test_calls_of_queries_that_run_at_once_are_told_apart(exported: dict[str, Ran]):
    """They have the same names in each."""
    voyage, endless = exported["voyage"].history, exported["endless"].history
    metrics = told(Metrics(), voyage, endless)
    outcomes: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    for history in (voyage, endless):
        asked = {record.body["call"]: record.body["role"] for record in of(history, "call.intent")}
        for record in of(history, "call.result"):
            roles[asked[record.body["call"]]] += 1
            outcomes[record.body["outcome"]] += asked[record.body["call"]] == "sub"
    assert outcomes["void"] == 1
    for outcome, count in outcomes.items():
        assert value(metrics, "airlock_sub_calls_total", outcome=outcome) == count
    assert value(metrics, "airlock_sub_calls_total", outcome="repeated") == len([*of(voyage, "call.repeated")]) > 0
    for role in ("root", "sub"):
        assert value(metrics, "airlock_lm_request_seconds_count", role=role) == roles[role] > 0
    assert value(metrics, "airlock_refused_total", what="call", kind="not-permitted") == 1
    assert value(metrics, "airlock_refused_total", what="query", kind="count-exceeded") == 1


def test_what_was_charged_without_a_result_is_spent_all_the_same(exported: dict[str, Ran]):
    voyage = exported["voyage"].history
    lost = [record for record in voyage if record.type != "call.result"]
    cost = float(voyage[-1].body["cost_usd"])
    assert value(told(Metrics(), lost), "airlock_spent_usd_total") == cost
    # A query that was resumed here: what it cost elsewhere was counted there.
    resumed = [Event("query.resumed", "root", {}), Event("query.closed", "root", voyage[-1].body)]
    metrics = Metrics()
    for event in resumed:
        metrics.event(event, "q")
    assert value(metrics, "airlock_spent_usd_total") == 0
    assert value(metrics, "airlock_queries_total", status="answered") == 1


def test_nothing_is_kept_of_a_query_that_has_ended(exported: dict[str, Ran]):
    metrics = told(Metrics(), exported["voyage"].history)
    metrics.event(Event("query.opened", "root", {}), "lost")
    metrics.ended("lost")
    metrics.event(Event("query.opened", "root", {}), "interrupted")
    metrics.event(Event("query.interrupted", "root", {}), "interrupted")
    assert not metrics._open


def test_gauges_are_looked_up_when_they_are_asked_for():
    metrics, running = Metrics(), [0]
    metrics.watch(running=lambda: running[0], waiting=lambda: 5, pool=lambda: 7)
    for count in (1, 2):
        running[0] = count
        text, kind = metrics.text()
        assert f"airlock_queries_running {count}.0" in text.decode()
        assert "airlock_queue_waiting 5.0\n" in text.decode()
        assert "airlock_pool_ready 7.0\n" in text.decode()
        assert kind.startswith("text/plain")


def test_a_method_of_ones_own_makes_no_series_of_its_own():
    metrics = Metrics()
    for method in ("GET", "BREW", "G\n\x00", "get"):
        metrics.request(method, "/v1/queries", 200, 0.01)
    metrics.request("GET", "/v1/queries/{query}/events", 200, 900, stream=True)
    assert value(metrics, "airlock_http_requests_total", method="GET", route="/v1/queries", status="200") == 1
    assert value(metrics, "airlock_http_requests_total", method="other", route="/v1/queries", status="200") == 3
    assert value(metrics, "airlock_http_request_seconds_count", route="/v1/queries") == 4
    assert not value(metrics, "airlock_http_request_seconds_count", route="/v1/queries/{query}/events")


def test_faults_are_counted_from_nought():
    metrics = Metrics()
    assert value(metrics, "airlock_http_faults_total") == 0  # a rate needs a zero to begin with
    metrics.request("GET", "/readyz", 503, 0.01)
    metrics.request("GET", "/v1/queries", 503, 0.01, fault=True)
    assert value(metrics, "airlock_http_faults_total") == 1


@quick
@given(histories())
def test_any_events_are_counted_and_name_nobody(history: list[Recorded]):
    text = told(Metrics(), history).text()[0].decode()
    for name in ("tenant=", "query=", "model=", "\ud800"):
        assert name not in text
