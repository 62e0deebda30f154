"""What an OpenAI-compatible server says, and what the proxy is told: every reply and every fault has one meaning."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
import pytest
from anyio.abc import SocketAttribute, SocketStream
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.errors import ModelError, OutcomeUnknown, ProviderBusy, ProviderError, ProviderRefused
from orchestrator.lm.base import Reply, Request, Usage
from orchestrator.lm.openai import OpenAILM
from orchestrator.lm.replies import BYTES_A_TOKEN, REPLY_BYTES
from tests.unit.helpers import quick, user

pytestmark = pytest.mark.anyio

KEY = "sk-very-secret"
REQUEST = Request("m", [user("hi")], 99, 5.0)
WHOLE = {
    "choices": [{"message": {"role": "assistant", "content": "42"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}
BAD = b'{"error": {"message": "bad \\ud800 thing"}}'
JSON = {"content-type": "application/json"}
Handler = Callable[[httpx2.Request], httpx2.Response]


def connected(handler: Handler, base_url: str | None = "http://lm.test/v1", **options: Any) -> OpenAILM:
    """An LM whose connection ends in `handler`."""
    lm = OpenAILM(base_url, KEY, **options)
    lm._connect()._client._transport = httpx2.MockTransport(handler)
    return lm


async def ask(handler: Handler) -> Reply:
    lm = connected(handler)
    try:
        return await lm.ask(REQUEST)
    finally:
        await lm.aclose()


async def refusal(handler: Handler) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await ask(handler)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return caught.value


def says(body: Any, status: int = 200, **headers: str) -> Handler:
    return lambda _request: httpx2.Response(status, json=body, headers=headers)


def raises(error: type[Exception]) -> Handler:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise error("broken")

    return handler


async def test_a_whole_answer():
    assert await ask(says(WHOLE)) == Reply("42", "stop", Usage(3, 2))


@pytest.mark.parametrize(
    ("base_url", "own"),
    [(None, {"max_completion_tokens": 99, "service_tier": "default"}), ("http://lm.test", {"max_tokens": 99})],
)
async def test_what_is_sent(base_url: str | None, own: dict[str, Any]):
    sent: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, json=WHOLE)

    lm = connected(handler, base_url, extra={"temperature": 0})
    await lm.ask(REQUEST)
    await lm.aclose()
    await lm.aclose()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "n": 1, "temperature": 0}
    assert json.loads(sent[0].content) == body | own | {"stream": True, "stream_options": {"include_usage": True}}
    assert sent[0].headers["authorization"] == f"Bearer {KEY}"
    assert not [name for name in sent[0].headers if name.startswith("x-stainless")]  # which tell of the host


async def test_nothing_is_retried_down_here():
    count = 0

    def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal count
        count += 1
        return httpx2.Response(503)

    await refusal(handler)
    assert count == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ProviderRefused),
        (401, ProviderRefused),
        (402, ProviderRefused),
        (403, ProviderRefused),
        (404, ProviderRefused),
        (413, ProviderRefused),
        (422, ProviderRefused),
        (408, OutcomeUnknown),
        (409, ProviderBusy),
        (429, ProviderBusy),
        (500, ProviderBusy),
        (502, ProviderBusy),
        (503, ProviderBusy),
        (504, OutcomeUnknown),
        (524, OutcomeUnknown),
        (529, ProviderBusy),
    ],
)
async def test_statuses(status: int, kind: type[ProviderError]):
    error = await refusal(says({"error": {"message": f"no:\n{KEY}"}}, status))
    assert type(error) is kind
    assert str(status) in str(error)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("0", 0.0),
        *[(text, None) for text in ("", "-1", "nan", "inf", "99999999", "soon", "Wed, 21 Oct 2026 07:28:00 GMT")],
    ],
)
async def test_retry_after(header: str, seconds: float | None):
    error = await refusal(says({}, 429, **{"retry-after": header}))
    assert isinstance(error, ProviderBusy)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx2.ConnectError, ProviderBusy),
        (httpx2.ConnectTimeout, ProviderBusy),
        (httpx2.PoolTimeout, ProviderBusy),
        (httpx2.ReadTimeout, OutcomeUnknown),
        (httpx2.WriteTimeout, OutcomeUnknown),
        (httpx2.ReadError, OutcomeUnknown),
        (httpx2.WriteError, OutcomeUnknown),
        (httpx2.RemoteProtocolError, OutcomeUnknown),
    ],
)
async def test_only_what_never_left_is_free(error: type[Exception], kind: type[ProviderError]):
    assert type(await refusal(raises(error))) is kind


@pytest.mark.parametrize("body", [b"", b"not json", b"{", b"<html></html>", b"\xff\xfe", b'{"choices": [}'])
@pytest.mark.parametrize("media", ["application/json", "text/html", ""])
async def test_what_is_no_json_may_have_been_billed(body: bytes, media: str):
    answer = httpx2.Response(200, content=body, headers={"content-type": media} if media else {})
    assert isinstance(await refusal(lambda _request: answer), OutcomeUnknown)


@pytest.mark.parametrize(
    "choices", [None, [], {}, "42", [{}], [{"message": {"content": 42}}], [{"message": {"content": ["a"]}}]]
)
async def test_an_answer_without_a_text_may_have_been_billed(choices: Any):
    assert isinstance(await refusal(says({**WHOLE, "choices": choices})), OutcomeUnknown)


async def test_no_content_is_an_empty_text():
    assert (await ask(says({"choices": [{"message": {"content": None}}]}))).text == ""


async def test_the_key_is_not_told_where_the_providers_words_are_cut():
    long = {"error": {"message": "x" * 280 + f" your key {KEY}-and-more-of-it"}}
    assert KEY[:8] not in str(await refusal(says(long, 400)))


async def test_half_a_character_in_an_error_or_a_reason():
    assert "bad ? thing" in str(await refusal(lambda _request: httpx2.Response(400, content=BAD)))
    whole = json.loads(json.dumps(WHOLE))
    whole["choices"][0]["finish_reason"] = "\ud800"
    reply = await ask(lambda _request: httpx2.Response(200, content=json.dumps(whole).encode(), headers=JSON))
    assert reply.finish_reason == "?"


async def test_a_reply_nested_without_end_may_have_been_billed():
    error = await refusal(lambda _request: httpx2.Response(200, content=b"[" * 200_000, headers=JSON))
    assert isinstance(error, OutcomeUnknown)


async def test_a_reply_without_end_is_given_up():
    async def body() -> AsyncIterator[bytes]:
        piece = b" " * (1 << 20)
        for number in range(1 << 10):
            assert number <= REPLY_BYTES >> 20, "it is still read"
            yield piece

    error = await refusal(lambda _request: httpx2.Response(200, content=body()))
    assert isinstance(error, OutcomeUnknown)


async def test_a_reply_that_would_unpack_to_anything_is_not_unpacked():
    packed = gzip.compress(b" " * (1 << 20) + json.dumps(WHOLE).encode())
    seen: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, headers={"content-encoding": "gzip"}, stream=httpx2.ByteStream(packed))

    assert isinstance(await refusal(handler), OutcomeUnknown)
    assert seen[0].headers["accept-encoding"] == "identity"


async def test_half_a_character_does_not_get_through():
    answer = httpx2.Response(200, content=b'{"choices":[{"message":{"content":"a\\ud800"}}]}')
    assert (await ask(lambda _request: answer)).text == "a?"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "usage", "prompt_tokens", "completion_tokens", "finish_reason"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@quick
@given(values)
@example([])
@example("text")
@example(None)
@example({"choices": [None]})
@example({"choices": [["a"]]})
@example({"choices": [{"message": "a"}]})
async def test_any_json_is_a_reply_or_an_unknown_outcome(body: Any):
    try:
        reply = await ask(says(body))
    except OutcomeUnknown:
        return
    assert isinstance(reply.text, str)
    reply.text.encode()
    assert isinstance(reply.finish_reason, str)
    assert reply.usage is None or min(reply.usage.input_tokens, reply.usage.output_tokens) >= 0


def test_what_the_operator_adds_cannot_lift_a_bound():
    with pytest.raises(ModelError, match="'n' may not be added"):
        OpenAILM(None, KEY, {"temperature": 0, "n": 5})


# Streams


def events(*bodies: Any, done: bool = True) -> list[bytes]:
    data = [json.dumps(body).encode() for body in bodies] + ([b"[DONE]"] if done else [])
    return [b"data: %s\n\n" % line for line in data]


def delta(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **more}


SAID = events(delta("4"), delta("2", "stop"), {"choices": [], "usage": WHOLE["usage"]})


def streams(*pieces: bytes, error: type[Exception] | None = None) -> Handler:
    """A body of these pieces; then it ends, or breaks."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if error:
            raise error("broken")

    return lambda _request: httpx2.Response(200, content=body(), headers={"content-type": "text/event-stream"})


async def test_a_stream():
    assert await ask(streams(*SAID)) == Reply("42", "stop", Usage(3, 2))


@pytest.mark.parametrize("count", range(len(SAID)))
@pytest.mark.parametrize("error", [httpx2.ReadError, httpx2.RemoteProtocolError, httpx2.ReadTimeout, None])
async def test_a_stream_that_breaks(count: int, error: type[Exception] | None):
    """After the reason why it ends, only the usage can be missing: the text is whole, and charged at its bound."""
    handler = streams(*SAID[:count], error=error)
    if count < 2:
        assert isinstance(await refusal(handler), OutcomeUnknown)
    else:
        assert await ask(handler) == Reply("42", "stop", Usage(3, 2) if count > 2 else None)


async def test_an_error_in_a_stream_is_told_without_the_key():
    error = await refusal(streams(*events(delta("4"), {"error": {"message": f"no\nmore: {KEY}"}})))
    assert isinstance(error, OutcomeUnknown)
    assert "failed in the midst of its answer: no more: ***" in str(error)


REFUSES_OPTIONS = {"error": {"message": "Unknown parameter", "param": "stream_options"}}
REFUSES_STREAMS = {"detail": [{"loc": ["body", "stream"], "msg": "not supported"}]}


class Choosy:
    """A server that refuses to stream, or to say what a stream used, and says so in its own way."""

    def __init__(self, refuses: str, body: Any, status: int) -> None:
        self.refuses = refuses
        self.body = body
        self.status = status
        self.asked: list[tuple[bool, bool]] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        sent = json.loads(request.content)
        self.asked.append(("stream" in sent, "stream_options" in sent))
        if self.refuses in sent:
            return httpx2.Response(self.status, json=self.body)
        return streams(*SAID)(request) if "stream" in sent else httpx2.Response(200, json=WHOLE)


@pytest.mark.parametrize(
    ("server", "asked"),
    [
        (Choosy("stream_options", REFUSES_OPTIONS, 400), [(True, True), (True, False), (True, False)]),
        (Choosy("stream", REFUSES_STREAMS, 422), [(True, True), (False, False), (False, False)]),
    ],
)
async def test_a_server_that_will_not_stream_is_asked_in_another_way(server: Choosy, asked: list[tuple[bool, bool]]):
    """By the proxy, at once, under a reservation of its own; and from then on."""
    lm = connected(server)
    with pytest.raises(ProviderBusy, match="in another way") as busy:
        await lm.ask(REQUEST)
    assert busy.value.retry_after == 0
    assert await lm.ask(REQUEST) == await lm.ask(REQUEST) == Reply("42", "stop", Usage(3, 2))
    assert server.asked == asked
    await lm.aclose()


async def test_a_prompt_does_not_bring_about_another_way():
    server = Choosy("stream_options", {"error": {"message": "bad prompt: talk of stream_options"}}, 400)
    lm = connected(server)
    for _ in range(2):
        with pytest.raises(ProviderRefused):
            await lm.ask(Request("m", [user("talk of stream_options")], 99, 5.0))
    assert server.asked == [(True, True)] * 2
    await lm.aclose()


async def test_a_stream_that_does_not_tell_its_usage_is_not_asked_for_again():
    """Where the usage cannot be asked for: else every call would be charged at its bound."""
    server = Choosy("stream_options", REFUSES_OPTIONS, 400)
    lm = connected(lambda request: streams(*SAID[:2])(request) if server.asked[1:2] else server(request))
    with pytest.raises(ProviderBusy):
        await lm.ask(REQUEST)
    server.asked.append((True, False))
    assert (await lm.ask(REQUEST)).usage is None
    server.asked[1:] = []
    assert await lm.ask(REQUEST) == Reply("42", "stop", Usage(3, 2))
    assert server.asked[-1] == (False, False)
    await lm.aclose()


# A server of our own, which sees what becomes of its connection


@asynccontextmanager
async def serving(answer: Callable[[SocketStream], Awaitable[None]]) -> AsyncIterator[tuple[OpenAILM, anyio.Event]]:
    """An LM, and what is set when a connection of it is over."""
    over = anyio.Event()

    async def serve(stream: SocketStream) -> None:
        async with stream:
            try:
                while await stream.receive():
                    await answer(stream)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                over.set()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        port = listener.listeners[0].extra(SocketAttribute.local_port)  # noqa: S610  no database
        lm = OpenAILM(f"http://127.0.0.1:{port}/v1", KEY)
        yield lm, over
        await lm.aclose()
        tasks.cancel_scope.cancel()


async def gone(over: anyio.Event) -> None:
    with anyio.fail_after(5):
        await over.wait()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def endless(stream: SocketStream) -> None:
    await stream.send(HEAD)
    piece = chunk(events(delta("word "), done=False)[0])
    while True:
        await stream.send(piece)


async def test_a_stream_without_end_is_ended():
    """And what came is the reply, without a usage: it is charged at its bound."""
    async with serving(endless) as (lm, over):
        reply = await lm.ask(Request("m", [user("hi")], 10, 60))
        assert (reply.finish_reason, reply.usage) == ("length", None)
        assert len(reply.text) == 10 * BYTES_A_TOKEN
        assert reply.text.startswith("word word ")
        await gone(over)


async def test_a_stream_in_time_is_no_stream_in_time_for_ever():
    async with serving(endless) as (lm, over):
        with pytest.raises(OutcomeUnknown, match="did not answer within"):
            await lm.ask(Request("m", [user("hi")], 10**9, 0.2))
        await gone(over)


@pytest.mark.parametrize("how", ["scope", "task"])
async def test_cancelling_closes_the_connection_at_once(how: str):
    started = anyio.Event()

    async def answer(stream: SocketStream) -> None:
        await stream.send(HEAD + chunk(events(delta("word "), done=False)[0]))
        started.set()
        await stream.receive()  # nothing more comes

    async with serving(answer) as (lm, over):
        request = Request("m", [user("hi")], 10, 60)
        if how == "scope":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lm.ask, request)
                await started.wait()
                tasks.cancel_scope.cancel()
        else:
            task = asyncio.create_task(lm.ask(request))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await gone(over)


@pytest.mark.parametrize("tail", [b"", b"data: [DONE]\n\n"])
async def test_a_server_that_does_not_hang_up_is_not_waited_for(tail: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.lm.openai.TAIL_S", 0.1)

    async def answer(stream: SocketStream) -> None:
        await stream.send(HEAD + chunk(b"".join(SAID[:2])) + (chunk(tail) if tail else b""))

    async with serving(answer) as (lm, over):
        with anyio.fail_after(5):
            assert await lm.ask(Request("m", [user("hi")], 10, 60)) == Reply("42", "stop", None)
        await gone(over)


@pytest.mark.parametrize("server", ["uvicorn", "llama.cpp"])
async def test_a_connection_is_used_again_after_a_stream(server: str):
    """But for that of a server which is known to hang up after a stream: a request would be lost, and paid for."""
    connections: list[SocketStream] = []
    head = HEAD.replace(b"\r\n", b"\r\nserver: %s\r\n" % server.encode(), 1)

    async def answer(stream: SocketStream) -> None:
        connections.append(stream)
        await stream.send(head + b"".join(map(chunk, SAID)) + b"0\r\n\r\n")

    async with serving(answer) as (lm, _over):
        for _ in range(3):
            assert (await lm.ask(REQUEST)).text == "42"
        assert len(set(map(id, connections))) == (1 if server == "uvicorn" else 3)
