"""What an OpenAI-compatible server says, and what the proxy is told: every reply and every fault has one meaning.

Each test has a server of its own on this machine, which answers, breaks or stays silent as it is told.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.errors import ModelError, OutcomeUnknown, ProviderBusy, ProviderError, ProviderRefused
from orchestrator.lm.base import Reply, Request, Usage
from orchestrator.lm.openai import REASON_BYTES, OpenAILM
from orchestrator.lm.replies import BYTES_A_TOKEN, REPLY_BYTES
from tests.certificate import certificate
from tests.unit.helpers import quick, user

pytestmark = pytest.mark.anyio

KEY = "sk-very-secret"
REQUEST = Request("m", [user("hi")], 99, 5.0)
SHORT = Request("m", [user("hi")], 99, 0.3)
WHOLE = {
    "choices": [{"message": {"role": "assistant", "content": "42"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}
BAD = b'{"error": {"message": "bad \\ud800 thing"}}'
Then = Literal["goes on", "closes", "resets", "is silent"]


@dataclass(frozen=True)
class Asked:
    """A request. line: its first. headers: names in small letters."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """What goes over the connection, as it is, and what becomes of the connection."""

    sent: bytes
    then: Then = "goes on"


Handler = Callable[[Asked], Answer]


async def requests(stream: ByteStream) -> AsyncIterator[Asked]:
    """What comes over a connection, until it is over."""
    buffered = BufferedByteReceiveStream(stream)
    with suppress(anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
        while True:
            first, *fields = (await buffered.receive_until(b"\r\n\r\n", 1 << 16)).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
            yield Asked(first, headers, await buffered.receive_exactly(int(headers.get("content-length", 0))))


@asynccontextmanager
async def listening(serve: Callable[[Any], Awaitable[None]], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server that gives each connection to `serve`."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as tcp:
        listener = TLSListener(tcp, tls, standard_compatible=False) if tls else tcp
        serving = asyncio.create_task(listener.serve(serve))  # no task group, which would wrap what the test raises
        try:
            yield tcp.listeners[0].extra(SocketAttribute.local_port)  # noqa: S610  no database
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving


@asynccontextmanager
async def answering(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server that answers each request as `handler` says."""

    async def serve(stream: ByteStream) -> None:
        async with stream:
            async for asked in requests(stream):
                answer = handler(asked)
                await stream.send(answer.sent)
                if answer.then == "is silent":
                    await anyio.sleep_forever()
                if answer.then == "resets":
                    linger = struct.pack("ii", 1, 0)
                    stream.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # noqa: S610  no database
                if answer.then != "goes on":
                    return

    async with listening(serve, tls) as port:
        yield port


@asynccontextmanager
async def asking(base_url: str | None, **options: Any) -> AsyncIterator[OpenAILM]:
    lm = OpenAILM(base_url, KEY, **options)
    try:
        yield lm
    finally:
        await lm.aclose()


@asynccontextmanager
async def connected(handler: Handler, **options: Any) -> AsyncIterator[OpenAILM]:
    async with answering(handler) as port, asking(f"http://127.0.0.1:{port}/v1", **options) as lm:
        yield lm


async def ask(handler: Handler, request: Request = REQUEST) -> Reply:
    async with connected(handler) as lm:
        return await lm.ask(request)


async def refusal(handler: Handler, request: Request = REQUEST) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await ask(handler, request)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return caught.value


def reply(body: bytes, status: int = 200, **headers: str) -> Answer:
    """headers: `_` for `-`; a length of theirs goes before the true one."""
    told = {"content_type": "application/json", "content_length": str(len(body)), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in told.items()]
    return Answer("\r\n".join([f"HTTP/1.1 {status} So", *lines, "", ""]).encode() + body)


def says(body: Any, status: int = 200, **headers: str) -> Handler:
    return lambda _asked: reply(json.dumps(body).encode(), status, **headers)


async def test_a_whole_answer():
    assert await ask(says(WHOLE)) == Reply("42", "stop", Usage(3, 2))


@pytest.mark.parametrize(
    ("openai", "own"),
    [(True, {"max_completion_tokens": 99, "service_tier": "default"}), (False, {"max_tokens": 99})],
)
async def test_what_is_sent(openai: bool, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    sent: list[Asked] = []

    def handler(asked: Asked) -> Answer:
        sent.append(asked)
        return reply(json.dumps(WHOLE).encode(), set_cookie="who=us")

    async with answering(handler) as port:
        address = f"http://127.0.0.1:{port}/v1"
        monkeypatch.setattr("orchestrator.lm.openai.OPENAI", address)
        async with asking(None if openai else f"{address}/", extra={"temperature": 0}) as lm:
            await lm.ask(REQUEST)
            await lm.ask(REQUEST)
            await lm.aclose()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "n": 1, "temperature": 0}
    assert sent[0].json == body | own | {"stream": True, "stream_options": {"include_usage": True}}
    assert sent[0].line == "POST /v1/chat/completions HTTP/1.1"
    # And nothing of the host, nor of what was answered before.
    assert sent[1].headers == {
        "host": f"127.0.0.1:{port}",
        "authorization": f"Bearer {KEY}",
        "content-type": "application/json",
        "content-length": str(len(sent[1].body)),
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": "airlock",
    }


async def test_a_name_and_password_in_the_address_go_before_the_key():
    sent: list[Asked] = []

    def handler(asked: Asked) -> Answer:
        sent.append(asked)
        return says(WHOLE)(asked)

    async with answering(handler) as port, asking(f"http://me:secret@127.0.0.1:{port}/v1") as lm:
        await lm.ask(REQUEST)
    assert sent[0].headers["authorization"] == "Basic bWU6c2VjcmV0"


@pytest.mark.parametrize("info", ["me:hunter2-secret@", "me:hunter2/secret@", "hunter2-secret@", "a@b:hunter2-secret@"])
@pytest.mark.parametrize("tail", [":9/v1", ":port/v1", "[v1"])
async def test_no_error_tells_a_password_of_the_address(info: str, tail: str):
    async with asking(f"http://{info}127.0.0.1{tail}") as lm:
        with pytest.raises(ProviderError) as caught:
            await lm.ask(REQUEST)
    assert f"http://127.0.0.1{tail}" in str(caught.value)
    assert "hunter2" not in str(caught.value)


async def test_a_password_that_a_server_repeats_is_not_told():
    handler = says({"error": {"message": "who is me with hunter2-secret?"}}, 400)
    async with answering(handler) as port, asking(f"http://me:hunter2%2Dsecret@127.0.0.1:{port}/v1") as lm:
        with pytest.raises(ProviderRefused, match=r"who is me with \*\*\*\?"):
            await lm.ask(REQUEST)


@pytest.mark.parametrize("status", [400, 401, 404, 408, 429, 500, 307])
async def test_a_guest_is_not_told_where_the_server_is(status: int):
    error = await refusal(says({"error": {"message": "no"}}, status))
    assert "http://127.0.0.1:" in str(error)
    assert "127.0.0.1" not in error.told
    assert error.told.startswith("the provider ")


async def test_a_large_prompt_arrives_whole():
    prompt = "\u20ac" * (4 << 20)

    def handler(asked: Asked) -> Answer:
        assert asked.json["messages"][0]["content"] == prompt
        return reply(json.dumps(WHOLE).encode())

    assert (await ask(handler, Request("m", [user(prompt)], 99, 60.0))).text == "42"


@pytest.mark.parametrize("then", ["goes on", "closes"])
async def test_nothing_is_retried_down_here(then: Then):
    count = 0

    def handler(_asked: Asked) -> Answer:
        nonlocal count
        count += 1
        return Answer(reply(b"", 503).sent if then == "goes on" else b"", then)

    await refusal(handler)
    assert count == 1


async def test_no_redirect_is_followed():
    """A server that is trusted with the key may not pass it on."""
    count = 0

    def handler(_asked: Asked) -> Answer:
        nonlocal count
        count += 1
        return reply(b"", 307, location="/v1/chat/completions")

    error = await refusal(handler)
    assert isinstance(error, ProviderRefused)
    assert "elsewhere (307)" in str(error)
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


async def test_what_never_left_is_free(monkeypatch: pytest.MonkeyPatch):
    """No server, no such name, nobody who takes the connection, a proxy that will not."""
    with socket.socket() as closed, socket.socket() as full, socket.socket() as first, socket.socket() as second:
        closed.bind(("127.0.0.1", 0))
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):  # what more comes is left to wait
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        ports = [taken.getsockname()[1] for taken in (closed, full)]
        for address in (*(f"http://127.0.0.1:{port}/v1" for port in ports), "http://nobody.invalid/v1"):
            async with asking(address) as lm:
                with pytest.raises(ProviderBusy, match="cannot connect to"):
                    await lm.ask(SHORT)
    async with answering(lambda _asked: reply(b"", 403)) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        async with asking("https://nobody.invalid/v1") as lm:
            with pytest.raises(ProviderBusy, match="cannot connect to"):
                await lm.ask(REQUEST)


@pytest.mark.parametrize("address", ["http://[v1", "http://:80/v1", "http://127.0.0.1:port/v1"])
async def test_what_is_no_address_is_free(address: str):
    async with asking(address) as lm:
        with pytest.raises(ProviderRefused, match="is not the address of a server"):
            await lm.ask(REQUEST)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b"", "closes"),
        Answer(b"", "resets"),
        Answer(b"", "is silent"),
        Answer(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        Answer(b"HTTP/1.1 200", "closes"),
        Answer(b"HTTP/1.1 200 OK\r\nx: " + b"y" * (1 << 20)),
        reply(json.dumps(WHOLE).encode(), content_length="9999", connection="close"),
        Answer(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
    ],
)
async def test_what_may_have_left_is_not_free(answer: Answer):
    then: Then = "closes" if b"9999" in answer.sent else answer.then
    assert isinstance(await refusal(lambda _asked: Answer(answer.sent, then), SHORT), OutcomeUnknown)


async def test_a_connection_that_was_used_before_and_breaks_is_not_free():
    """The server had the second request, and may have done its work. So it is asked once, and not called free."""
    seen: list[Asked] = []

    def handler(asked: Asked) -> Answer:
        seen.append(asked)
        return reply(json.dumps(WHOLE).encode()) if len(seen) == 1 else Answer(b"", "resets")

    async with connected(handler) as lm:
        await lm.ask(REQUEST)
        with pytest.raises(OutcomeUnknown, match="broke before the answer was whole"):
            await lm.ask(REQUEST)
    assert len(seen) == 2


@pytest.mark.parametrize("body", [b"", b"not json", b"{", b"<html></html>", b"\xff\xfe", b'{"choices": [}'])
@pytest.mark.parametrize("media", ["application/json", "text/html", ""])
async def test_what_is_no_json_may_have_been_billed(body: bytes, media: str):
    assert isinstance(await refusal(lambda _asked: reply(body, content_type=media)), OutcomeUnknown)


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


async def test_half_of_another_key_is_not_told_where_the_providers_words_are_cut():
    long = {"error": {"message": "x" * 280 + " not sk-proj-" + "a1B2c3D4" * 8}}
    assert str(await refusal(says(long, 400))).endswith("x not ...")


async def test_half_a_character_in_an_error_or_a_reason():
    assert "bad ? thing" in str(await refusal(lambda _asked: reply(BAD, 400)))
    whole = json.loads(json.dumps(WHOLE))
    whole["choices"][0]["finish_reason"] = "\ud800"
    assert (await ask(says(whole))).finish_reason == "?"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too hot", "param": "temperature"}}', "too hot"),
        (b'{"error": "too hot"}', "too hot"),
        (b'{"detail": "too hot"}', '{"detail": "too hot"}'),
        (b"too hot", "too hot"),
        (b'{"error": {"message": ["too", "hot"]}}', '{"error": {"message": ["too", "hot"]}}'),
        (b"", "it gives no reason"),
    ],
)
async def test_what_an_error_says(body: bytes, said: str):
    assert str(await refusal(lambda _asked: reply(body, 400))).endswith(f"refused the request (400): {said}")


async def test_an_error_that_is_long_packed_or_broken_is_known_by_its_status(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.lm.openai.TAIL_S", 0.1)
    head = reply(b"", 429, content_length=str(1 << 30)).sent
    for answer in (
        Answer(head + b"x" * 2 * REASON_BYTES),
        Answer(head + b"x", "is silent"),
        Answer(head + b"x", "closes"),
        reply(gzip.compress(b"no"), 429, content_encoding="gzip"),
    ):
        error = await refusal(lambda _asked, answer=answer: answer)
        assert isinstance(error, ProviderBusy)
        assert "busy or failing (429)" in str(error)


async def test_a_reply_nested_without_end_may_have_been_billed():
    assert isinstance(await refusal(lambda _asked: reply(b"[" * 200_000)), OutcomeUnknown)


async def test_a_reply_without_end_is_given_up():
    async def endless_body(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(reply(b"", content_length=str(1 << 40)).sent)
            with suppress(anyio.BrokenResourceError):
                while True:
                    await stream.send(b" " * (1 << 20))
            over.set()

    over = anyio.Event()
    async with listening(endless_body) as port, asking(f"http://127.0.0.1:{port}") as lm:
        with pytest.raises(OutcomeUnknown, match=f"more than {REPLY_BYTES:,} bytes"):
            await lm.ask(Request("m", [user("hi")], 99, 60.0))
        await gone(over)


async def test_a_reply_that_would_unpack_to_anything_is_not_unpacked():
    packed = gzip.compress(b" " * (1 << 20) + json.dumps(WHOLE).encode())
    error = await refusal(lambda _asked: reply(packed, content_encoding="gzip"))
    assert isinstance(error, OutcomeUnknown)
    assert "compressed" in str(error)


async def test_half_a_character_does_not_get_through():
    answer = reply(b'{"choices":[{"message":{"content":"a\\ud800"}}]}')
    assert (await ask(lambda _asked: answer)).text == "a?"


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


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def streams(*pieces: bytes, end: bytes = END, then: Then = "goes on") -> Handler:
    """A body of these pieces, each in a chunk of its own."""
    return lambda _asked: Answer(HEAD + b"".join(map(chunk, pieces)) + end, then)


async def test_a_stream():
    assert await ask(streams(*SAID)) == Reply("42", "stop", Usage(3, 2))


@pytest.mark.parametrize("count", range(len(SAID)))
@pytest.mark.parametrize(("end", "then"), [(END, "goes on"), (b"", "closes"), (b"", "is silent")])
async def test_a_stream_that_breaks(count: int, end: bytes, then: Then, monkeypatch: pytest.MonkeyPatch):
    """After the reason why it ends, only the usage can be missing: the text is whole, and charged at its bound."""
    monkeypatch.setattr("orchestrator.lm.openai.TAIL_S", 0.1)
    handler = streams(*SAID[:count], end=end, then=then)
    if count < 2:
        assert isinstance(await refusal(handler, SHORT), OutcomeUnknown)
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

    def __call__(self, asked: Asked) -> Answer:
        sent = asked.json
        self.asked.append(("stream" in sent, "stream_options" in sent))
        if self.refuses in sent:
            return reply(json.dumps(self.body).encode(), self.status)
        return streams(*SAID)(asked) if "stream" in sent else reply(json.dumps(WHOLE).encode())


@pytest.mark.parametrize(
    ("server", "asked"),
    [
        (Choosy("stream_options", REFUSES_OPTIONS, 400), [(True, True), (True, False), (True, False)]),
        (Choosy("stream", REFUSES_STREAMS, 422), [(True, True), (False, False), (False, False)]),
    ],
)
async def test_a_server_that_will_not_stream_is_asked_in_another_way(server: Choosy, asked: list[tuple[bool, bool]]):
    """By the proxy, at once, under a reservation of its own; and from then on."""
    async with connected(server) as lm:
        with pytest.raises(ProviderBusy, match="in another way") as busy:
            await lm.ask(REQUEST)
        assert busy.value.retry_after == 0
        assert await lm.ask(REQUEST) == await lm.ask(REQUEST) == Reply("42", "stop", Usage(3, 2))
    assert server.asked == asked


async def test_a_prompt_does_not_bring_about_another_way():
    server = Choosy("stream_options", {"error": {"message": "bad prompt: talk of stream_options"}}, 400)
    async with connected(server) as lm:
        for _ in range(2):
            with pytest.raises(ProviderRefused):
                await lm.ask(Request("m", [user("talk of stream_options")], 99, 5.0))
    assert server.asked == [(True, True)] * 2


async def test_a_stream_that_does_not_tell_its_usage_is_not_asked_for_again():
    """Where the usage cannot be asked for: else every call would be charged at its bound."""
    server = Choosy("stream_options", REFUSES_OPTIONS, 400)

    def handler(asked: Asked) -> Answer:
        return streams(*SAID[:2])(asked) if server.asked[1:2] else server(asked)

    async with connected(handler) as lm:
        with pytest.raises(ProviderBusy):
            await lm.ask(REQUEST)
        server.asked.append((True, False))
        assert (await lm.ask(REQUEST)).usage is None
        server.asked[1:] = []
        assert await lm.ask(REQUEST) == Reply("42", "stop", Usage(3, 2))
    assert server.asked[-1] == (False, False)


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

    async with listening(serve) as port, asking(f"http://127.0.0.1:{port}/v1") as lm:
        yield lm, over


async def gone(over: anyio.Event) -> None:
    with anyio.fail_after(5):
        await over.wait()


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


async def test_a_request_that_was_given_up_is_not_sent_to_its_end():
    """The server had stopped to read, so most of it was still here."""
    got = 0
    over = anyio.Event()
    given_up = anyio.Event()

    async def serve(stream: SocketStream) -> None:
        nonlocal got
        async with stream:
            got = len(await stream.receive())
            await given_up.wait()
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    got += len(await stream.receive())
            over.set()

    size = 64 << 20
    async with listening(serve) as port, asking(f"http://127.0.0.1:{port}") as lm:
        with pytest.raises(OutcomeUnknown):
            await lm.ask(Request("m", [user("x" * size)], 99, 4.0))
        given_up.set()
        await gone(over)
    assert got < size


# TLS and proxies


async def test_a_certificate_has_to_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trusted, context = certificate(tmp_path)
    async with answering(says(WHOLE), context) as port:
        address = f"https://127.0.0.1:{port}/v1"
        async with asking(address) as lm:
            with pytest.raises(ProviderRefused, match=r"trusts the certificate of https://127\.0\.0\.1:\d+/v1: mend"):
                await lm.ask(REQUEST)
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        async with asking(address) as lm:
            assert await lm.ask(REQUEST) == await lm.ask(REQUEST) == Reply("42", "stop", Usage(3, 2))
        async with asking(address.replace("127.0.0.1", "localhost")) as lm:  # trusted, and not for that name
            with pytest.raises(ProviderRefused, match="trusts the certificate of"):
                await lm.ask(REQUEST)


async def test_with_tls_too_the_connection_is_closed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And not when the server has said farewell, which this one does not."""
    trusted, context = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    over = anyio.Event()

    async def serve(stream: SocketStream) -> None:
        async with stream:
            came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
            server = context.wrap_bio(came, goes, server_side=True)
            steps: list[Callable[[], Any]] = [server.do_handshake, lambda: server.read(1 << 16)]
            steps.append(lambda: server.write(HEAD + chunk(SAID[0])))
            for step in steps:
                while True:
                    try:
                        step()
                        break
                    except ssl.SSLWantReadError:
                        if goes.pending:
                            await stream.send(goes.read())
                        came.write(await stream.receive())
            await stream.send(goes.read())
            try:
                while await stream.receive():
                    pass
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                over.set()

    async with listening(serve) as port, asking(f"https://127.0.0.1:{port}") as lm:
        with pytest.raises(OutcomeUnknown, match="did not answer within"):
            await lm.ask(SHORT)
        await gone(over)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
async def test_a_proxy_of_the_environment_is_used(name: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[Asked] = []

    def handler(asked: Asked) -> Answer:
        seen.append(asked)
        return says(WHOLE)(asked)

    async with answering(handler) as port:
        monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{port}")
        async with asking("http://nobody.invalid/v1") as lm:
            assert (await lm.ask(REQUEST)).text == "42"
        assert seen[0].line == "POST http://nobody.invalid/v1/chat/completions HTTP/1.1"
        assert seen[0].headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"
        monkeypatch.setenv("NO_PROXY", "nobody.invalid")
        async with asking("http://nobody.invalid/v1") as lm:
            with pytest.raises(ProviderBusy):
                await lm.ask(REQUEST)
    assert len(seen) == 1


@pytest.mark.parametrize("exempt", ["::1", "[::1]", "localhost, ::1"])
async def test_an_ipv6_address_is_exempt_from_the_proxy(exempt: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[Asked] = []

    def handler(one: Asked) -> Answer:
        asked.append(one)
        return reply(b"", 503)

    with socket.socket(socket.AF_INET6) as nobody:
        nobody.bind(("::1", 0))  # and no listen(): connections are refused
        async with answering(handler) as port, asking(f"http://[::1]:{nobody.getsockname()[1]}/v1") as lm:
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("NO_PROXY", exempt)
            with pytest.raises(ProviderBusy, match="cannot connect to"):
                await lm.ask(REQUEST)
    assert asked == []


async def test_a_proxy_that_speaks_no_http_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Else it would be sent the key as it is."""
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@127.0.0.1:1")
    async with asking("http://nobody.invalid/v1") as lm:
        with pytest.raises(ProviderRefused, match="no HTTP proxy") as caught:
            await lm.ask(REQUEST)
    assert "secret" not in str(caught.value)
    assert "nobody.invalid" not in caught.value.told
