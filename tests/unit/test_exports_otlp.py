"""Spans of a query: nested as it was, named as the conventions say, and without a text that nobody asked for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from orchestrator.core.errors import RequestError
from orchestrator.core.events import Recorded
from orchestrator.exports import otlp
from orchestrator.exports.otlp import lines, send
from orchestrator.exports.spans import spans
from tests.unit.exported import ANSWER, CONTEXT, QUESTION, SMILE, Ran, histories
from tests.unit.helpers import quick


@pytest.fixture
def voyage(exported: dict[str, Ran]) -> Ran:
    return exported["voyage"]


def named(found: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in found if span.name == name]


def attribute(span: ReadableSpan, name: str) -> Any:
    return dict(span.attributes or {}).get(name)


def path(span: ReadableSpan, found: list[ReadableSpan]) -> list[str]:
    """The names of the spans that it is in, the outermost first."""
    by_id = {other.context.span_id: other for other in found if other.context}
    names = [span.name]
    while span.parent:
        span = by_id[span.parent.span_id]
        names.insert(0, span.name)
    return names


def test_the_tree_of_spans(voyage: Ran):
    found = spans(voyage.history)
    top, *rest = found
    assert top.parent is None
    assert top.name == "invoke_workflow airlock"
    assert len({span.context.trace_id for span in found if span.context}) == 1
    assert len({span.context.span_id for span in found if span.context}) == len(found)
    assert len({span.name for span in rest if not span.parent}) == 0
    root = ["invoke_workflow airlock", "invoke_agent root", "turn"]
    cell = [*root, "execute_tool repl"]
    child = [*cell, "invoke_agent child", "turn"]
    counted: dict[tuple[str, ...], int] = {}
    for span in found:
        counted[tuple(path(span, found))] = counted.get(tuple(path(span, found)), 0) + 1
    assert (
        counted
        == {
            tuple(root[:1]): 1,
            tuple(root[:2]): 1,
            tuple(root): 5,
            (*root, "chat top"): 6,
            tuple(cell): 5,
            (*cell, "chat mid"): 3,  # one, two, three
            (*cell, "call"): 1,
            (*cell, "call", "chat mid"): 2,  # flaky
            tuple(child[:-1]): 1,
            tuple(child): 1,
            (*child, "chat mid"): 1,
            (*child, "execute_tool repl"): 1,
            (*child, "execute_tool repl", "chat mid"): 1,
        }
    )


def test_a_span_lies_within_the_one_that_it_is_in(exported: dict[str, Ran]):
    for ran in exported.values():
        found = spans(ran.history)
        by_id = {span.context.span_id: span for span in found if span.context}
        for span in found:
            assert span.start_time is not None
            assert span.end_time is not None
            assert span.start_time <= span.end_time
            if span.parent:
                around = by_id[span.parent.span_id]
                assert around.start_time is not None
                assert around.end_time is not None
                assert around.start_time <= span.start_time <= span.end_time <= around.end_time, span.name


def test_a_clock_that_was_set_back_ends_nothing_before_it_began(voyage: Ran):
    times = [record.at for record in voyage.history]
    back = [replace(record, at=at) for record, at in zip(voyage.history, reversed(times), strict=True)]
    for span in spans(back):
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time


def test_requests_have_what_the_conventions_ask_for(voyage: Ran):
    chats = [span for span in spans(voyage.history) if span.name.startswith("chat ")]
    for span in chats:
        assert span.kind is SpanKind.CLIENT
        assert attribute(span, "gen_ai.operation.name") == "chat"
        assert attribute(span, "gen_ai.provider.name") == "openai"
        assert span.name == f"chat {attribute(span, 'gen_ai.request.model')}"
        assert attribute(span, "gen_ai.request.max_tokens") == 4096
    tokens = [attribute(span, "gen_ai.usage.input_tokens") for span in chats]
    assert sorted(filter(None, tokens)) == sorted([100, 110, 200, 250, 300, 400, 50, 7, 11, 11, 11, 11])
    assert [attribute(span, "gen_ai.response.finish_reasons") for span in chats[:2]] == [["length"], ["stop"]]
    cost = sum(Decimal(attribute(span, "airlock.cost_usd")) for span in chats)
    assert cost == Decimal(attribute(spans(voyage.history)[0], "airlock.cost_usd")) > 0


def test_names_are_those_of_the_conventions(exported: dict[str, Ran]):
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    gone = {"gen_ai.prompt", "gen_ai.completion", "gen_ai.system"}
    operations = {item.value for item in gen_ai_attributes.GenAiOperationNameValues}
    for ran in exported.values():
        for span in spans(ran.history, content=True):
            names = set(span.attributes or {})
            assert {name for name in names if not name.startswith(("airlock.", "error."))} <= known - gone
            assert attribute(span, "gen_ai.operation.name") in operations | {None}


def test_what_failed_is_the_status_and_a_word(exported: dict[str, Ran]):
    def errors(ran: Ran) -> list[tuple[str, str]]:
        return [
            (span.name, attribute(span, "error.type"))
            for span in spans(ran.history)
            if span.status.status_code is StatusCode.ERROR
        ]

    assert errors(exported["voyage"]) == [("chat mid", "void"), ("execute_tool repl", "error")]
    assert errors(exported["endless"]) == [
        ("invoke_workflow airlock", "count-exceeded"),
        ("invoke_agent root", "count-exceeded"),
    ]
    (failed,) = [span for span in spans(exported["voyage"].history) if attribute(span, "error.type") == "error"]
    assert "ZeroDivisionError" in str(failed.status.description)


def test_refusals_and_limits_are_events(exported: dict[str, Ran]):
    def events(ran: Ran) -> list[tuple[str, str, dict[str, Any]]]:
        found = spans(ran.history)
        return [(span.name, event.name, dict(event.attributes or {})) for span in found for event in span.events]

    seen = {(where, what) for where, what, _ in events(exported["voyage"])}
    assert ("execute_tool repl", "airlock.call.refused") in seen
    assert ("execute_tool repl", "airlock.call.repeated") in seen
    assert ("invoke_agent root", "airlock.sandbox.started") in seen
    assert ("invoke_agent child", "airlock.sandbox.ended") in seen
    (hit,) = [fields for where, what, fields in events(exported["endless"]) if what == "airlock.limit.hit"]
    assert (hit["airlock.kind"], hit["airlock.limit"]) == ("count-exceeded", "2")


def test_texts_are_there_only_where_they_are_asked_for(voyage: Ran):
    bare, full = "".join(lines(voyage.history)), "".join(lines(voyage.history, content=True))
    for words in (QUESTION, ANSWER, "llm_query('one')", "plain two", "at last", "Nothing to run", "I look."):
        assert words not in bare, words
        assert words in full, words
    assert CONTEXT not in full  # which is in no record
    found = spans(voyage.history, content=True)
    sent = [seen.body["messages"] for seen in voyage.seen]
    for span in found:
        if span.name.startswith("chat "):
            asked = json.loads(attribute(span, "gen_ai.input.messages"))
            assert [{"role": said["role"], "content": said["parts"][0]["content"]} for said in asked] in sent
    (reply,) = json.loads(attribute(named(found, "invoke_agent root")[0], "gen_ai.output.messages"))
    part = {"type": "text", "content": ANSWER}
    assert reply == {"role": "assistant", "parts": [part], "finish_reason": "stop"}
    first, *_ = named(found, "execute_tool repl")
    code = "print(len(context), llm_query('one'))"
    assert json.loads(attribute(first, "gen_ai.tool.call.arguments")) == {"code": code}
    assert json.loads(attribute(first, "gen_ai.tool.call.result")) == {"stdout": "38 plain one\n"}


def test_texts_that_are_not_kept_are_left_out(voyage: Ran):
    for span in spans(voyage.erased(), content=True):
        assert not {name for name in span.attributes or {} if "messages" in name or "tool.call.arg" in name}
    lost = [record for record in voyage.of("call.intent", "root") if record.body["role"] == "root"][2]
    found = named(spans(voyage.erased("prompt", seqs=[lost.seq]), content=True), "chat top")
    assert ["gen_ai.input.messages" in (span.attributes or {}) for span in found] == [True, True, *[False] * 4]


def test_a_query_that_was_cut_off_is_told_as_unfinished(voyage: Ran):
    for length in range(1, len(voyage.history)):
        top, *_ = spans(voyage.history[:length])
        assert attribute(top, "error.type") == "unfinished"


def test_lines_are_what_the_library_reads(exported: dict[str, Ran], monkeypatch: pytest.MonkeyPatch):
    """Back into protocol buffers they are what the encoder made."""
    monkeypatch.setattr(otlp, "MOST_SPANS", 7)
    for ran in exported.values():
        found, read = spans(ran.history, content=True), []
        for line in lines(ran.history, content=True):
            fields = json.loads(line)
            for span in fields["resourceSpans"][0]["scopeSpans"][0]["spans"]:
                assert (len(span["traceId"]), len(span["spanId"])) == (32, 16)
                for name in {"traceId", "spanId", "parentSpanId"} & span.keys():
                    span[name] = base64.b64encode(bytes.fromhex(span[name])).decode()
                assert isinstance(span["kind"], int)
            request = ParseDict(fields, ExportTraceServiceRequest())
            read += list(request.resource_spans[0].scope_spans[0].spans)
            assert len(request.resource_spans[0].scope_spans[0].spans) <= 7
        assert read == list(encode_spans(found).resource_spans[0].scope_spans[0].spans)


def test_the_same_records_make_the_same_lines(voyage: Ran):
    assert list(lines(voyage.history)) == list(lines(voyage.history))


def test_hostile_text_breaks_no_line(voyage: Ran):
    (line,) = lines(voyage.history, content=True)
    assert line.splitlines() == [line[:-1]]
    assert SMILE[0] in line
    said = [
        json.loads(attribute(span, "gen_ai.output.messages"))
        for span in named(spans(voyage.history, content=True), "chat top")
    ]
    assert said[3][0]["parts"][0]["content"].endswith(SMILE)
    assert "\u202e" not in line


def test_a_large_span_has_a_line_for_itself(voyage: Ran, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(otlp, "MOST_BYTES", 1)
    assert len(list(lines(voyage.history))) == len(spans(voyage.history))


# To a collector


class Collector(BaseHTTPRequestHandler):
    status = 200
    seen: list[tuple[str, str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append((self.path, self.headers.get("x-key", ""), body))
        self.send_response(self.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name in the base class
        pass


@contextmanager
def collector(status: int = 200) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    handler = type("Handler", (Collector,), {"status": status, "seen": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.seen
        finally:
            server.shutdown()
            thread.join()


def test_a_collector_gets_all_spans(exported: dict[str, Ran], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(otlp, "MOST_SPANS", 7)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=mine")
    both = [exported["voyage"].history, exported["endless"].history]
    expected = [span for history in both for span in spans(history)]
    with collector() as (address, seen):
        assert send(both, address) == len(expected)
    read = [span for _, _, body in seen for span in _spans_of(body)]
    assert read == list(encode_spans(expected).resource_spans[0].scope_spans[0].spans)
    assert {(path, key) for path, key, _ in seen} == {("/v1/traces", "mine")}


def _spans_of(body: bytes) -> list[Any]:
    return list(ExportTraceServiceRequest.FromString(body).resource_spans[0].scope_spans[0].spans)


def test_a_path_of_ones_own(voyage: Ran):
    with collector() as (address, seen):
        send([voyage.history], f"{address}/otel/v1/traces")
    assert seen[0][0] == "/otel/v1/traces"


def test_a_collector_that_refuses(voyage: Ran, caplog: pytest.LogCaptureFixture):
    with collector(401) as (address, seen), pytest.raises(RequestError) as refused:
        send([voyage.history], address)
    assert "did not take the spans: " in str(refused.value)
    assert "401" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(seen) == 1
    assert not caplog.records  # it is said once


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "ftp://x", "http://", "http://[", "file:///etc/passwd"])
def test_what_is_no_address(voyage: Ran, endpoint: str):
    with pytest.raises(RequestError, match="has to be an address"):
        send([voyage.history], endpoint)


@quick
@given(histories())
def test_any_well_formed_records_make_spans(history: list[Recorded]):
    for content in (False, True):
        for line in lines(history, content=content):
            assert line.splitlines() == [line[:-1]]
            json.loads(line)
        assert encode_spans(spans(history, content=content)).SerializeToString() is not None
