"""What an OpenAI-compatible server says, and what the proxy is told: every reply and every fault has one meaning."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.errors import OutcomeUnknown, ProviderBusy, ProviderError, ProviderRefused
from orchestrator.lm.base import Reply, Request, Usage
from orchestrator.lm.openai import REPLY_BYTES, OpenAILM, _http
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
    http = _http(tls=False)
    http._transport = httpx2.MockTransport(handler)
    lm._client = openai.AsyncOpenAI(api_key=KEY, base_url=base_url, max_retries=0, http_client=http)
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


@pytest.mark.parametrize(("base_url", "cap"), [(None, "max_completion_tokens"), ("http://lm.test", "max_tokens")])
async def test_what_is_sent(base_url: str | None, cap: str):
    sent: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, json=WHOLE)

    lm = connected(handler, base_url, extra={"temperature": 0})
    await lm.ask(REQUEST)
    await lm.aclose()
    await lm.aclose()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], cap: 99, "n": 1, "temperature": 0}
    assert json.loads(sent[0].content) == body
    assert sent[0].headers["authorization"] == f"Bearer {KEY}"


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
        (408, ProviderBusy),
        (409, ProviderBusy),
        (429, ProviderBusy),
        (500, ProviderBusy),
        (502, ProviderBusy),
        (503, ProviderBusy),
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


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        [],
        "3",
        {"prompt_tokens": 3},
        {"prompt_tokens": None, "completion_tokens": 2},
        {"prompt_tokens": "3", "completion_tokens": 2},
        {"prompt_tokens": 3.5, "completion_tokens": 2},
        {"prompt_tokens": True, "completion_tokens": 2},
        {"prompt_tokens": -3, "completion_tokens": 2},
        {"prompt_tokens": 10**30, "completion_tokens": 2},
    ],
)
async def test_a_usage_that_cannot_be_read_is_none_at_all(usage: Any):
    assert (await ask(says({**WHOLE, "usage": usage}))).usage is None


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


async def test_what_the_operator_adds_does_not_lift_the_cap():
    sent: list[dict[str, Any]] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(json.loads(request.content))
        return httpx2.Response(200, json=WHOLE)

    lm = connected(handler, extra={"n": 5, "max_tokens": 10**6})
    await lm.ask(REQUEST)
    await lm.aclose()
    assert (sent[0]["n"], sent[0]["max_tokens"]) == (1, 99)
