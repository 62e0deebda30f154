"""Traces to a real collector: what it gets, and that nothing waits for it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

from orchestrator.core.errors import RequestError, StoreError
from orchestrator.core.events import Recorded
from orchestrator.exports.spans import spans
from orchestrator.server import traces as module
from orchestrator.server.traces import MOST_WAITING, Traces
from tests.collector import Collector, attributes, collecting
from tests.unit.exported import Ran

FIELDS: dict[str, Any] = {
    "request_id": "0123456789abcdef",
    "method": "POST",
    "route": "/v1/queries",
    "status": 202,
    "duration_ms": 3.5,
    "problem": None,
    "tenant": "acme",
    "asker": "k1",
    "query": "20261126-010203-0123456789",
}


@dataclass
class Sending:
    """histories: by query; one that is not there is a store that fails."""

    traces: Traces
    collector: Collector
    counted: Counter[str] = field(default_factory=Counter[str])


@contextmanager
def sending(histories: dict[str, list[Recorded]], status: int = 200) -> Iterator[Sending]:
    counted: Counter[str] = Counter()

    def history(query: str) -> list[Recorded]:
        if query not in histories:
            raise StoreError("the database is away")
        return histories[query]

    with collecting(status) as collector:
        traces = Traces(collector.url, history, lambda outcome: counted.update([outcome]))
        try:
            yield Sending(traces, collector, counted)
        finally:
            collector.hold.set()
            traces.close()
            for thread in threading.enumerate():  # nothing of it goes on beside the tests that follow
                if thread.name in ("airlock-traces", "airlock-spans"):
                    thread.join(30)


def test_a_query_that_ended_is_sent_as_its_trace(exported: dict[str, Ran]):
    voyage = exported["voyage"]
    with sending({voyage.id: voyage.history}) as sent:
        sent.traces.query(voyage.id)
        sent.traces.close()
        expected = encode_spans(spans(voyage.history)).resource_spans[0].scope_spans[0].spans
        assert sent.collector.spans() == list(expected)
        assert sent.counted == {"sent": 1}


def test_one_that_is_not_closed_is_not(exported: dict[str, Ran]):
    voyage = exported["voyage"]
    with sending({"cut": voyage.history[:-1], "none": []}) as sent:
        sent.traces.query("cut")
        sent.traces.query("none")
        sent.traces.close()
        assert not sent.collector.bodies
        assert not sent.counted


def test_a_request_is_a_span():
    began = time.time_ns() - 10**9
    with sending({}) as sent:
        sent.traces.request(FIELDS, began)
        sent.traces.request({**FIELDS, "status": 503, "problem": "store-unavailable", "query": None}, began)
        sent.traces.request({**FIELDS, "status": 503, "problem": "stopping", "query": None}, began)
        for probe in ("/healthz", "/readyz", "/metrics"):
            sent.traces.request({**FIELDS, "route": probe}, began)
        sent.traces.close()
        well, ill, busy = sent.collector.spans()
    assert (well.name, well.kind, well.parent_span_id) == ("POST /v1/queries", 2, b"")
    assert well.start_time_unix_nano == began
    assert well.end_time_unix_nano >= began + 10**9
    assert attributes(well) == {
        "http.request.method": "POST",
        "http.route": "/v1/queries",
        "http.response.status_code": 202,
        "airlock.request_id": "0123456789abcdef",
        "airlock.tenant": "acme",
        "airlock.query": "20261126-010203-0123456789",
    }
    assert (well.status.code, ill.status.code, busy.status.code) == (0, 2, 0)
    assert attributes(ill)["error.type"] == "503"
    assert attributes(ill)["airlock.problem"] == "store-unavailable"
    assert well.trace_id != ill.trace_id
    assert well.trace_id != hashlib.sha256(str(FIELDS["query"]).encode()).digest()[:16]


def test_nothing_waits_for_a_collector_that_hangs(exported: dict[str, Ran], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    voyage = exported["voyage"]
    with sending({voyage.id: voyage.history}) as sent:
        sent.collector.hold.clear()
        sent.traces.query(voyage.id)
        sent.collector.came.acquire()  # the first is on its way, and stays there
        began = time.monotonic()
        for _ in range(MOST_WAITING + 5):
            sent.traces.query(voyage.id)
        sent.traces.request(FIELDS, time.time_ns())
        assert sent.counted == {"dropped": 5}
        sent.traces.close()
        assert time.monotonic() - began < 5


def test_a_collector_that_refuses_is_told_of_once(exported: dict[str, Ran], caplog: pytest.LogCaptureFixture):
    voyage = exported["voyage"]
    with sending({voyage.id: voyage.history}, status=401) as sent:
        for query in (voyage.id, voyage.id, "away"):
            sent.traces.query(query)
        sent.traces.close()
        assert sent.counted == {"failed": 3}
    said = [record.getMessage() for record in caplog.records if record.name == "airlock.traces"]
    assert len(said) == 1
    assert "401" in said[0]


def test_a_password_in_the_address_is_not_told(exported: dict[str, Ran], caplog: pytest.LogCaptureFixture):
    voyage, failed = exported["voyage"], Counter[str]()
    with collecting(status=401) as collector:
        address = collector.url.replace("//", "//me:hunter2hunter2@")
        traces = Traces(address, lambda _query: voyage.history, lambda outcome: failed.update([outcome]))
        traces.query(voyage.id)
        traces.close()
    assert failed == {"failed": 1}
    assert collector.url.removeprefix("http://") in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://", "file:///etc/passwd"])
def test_what_is_no_address(endpoint: str):
    with pytest.raises(RequestError, match="has to be an address"):
        Traces(endpoint, lambda _query: [], lambda _outcome: None)
