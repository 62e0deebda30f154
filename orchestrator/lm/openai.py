"""Any server that speaks OpenAI's chat completions, through the `openai` SDK. One attempt an `ask`, no retries.

Replies are streamed, so that one without end can be ended: by closing the connection, which is what a provider sees.
"""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio

from orchestrator.core.errors import OutcomeUnknown, ProviderBusy, ProviderError, ProviderRefused
from orchestrator.lm import parameters, replies
from orchestrator.lm.base import LM, Reply, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2
    import openai

CONNECT_S = 10.0  # a connection that is not made costs nothing, so it may be tried again
TAIL_S = 5.0  # for the usage, after the text has ended
DRAIN_S = 0.1  # for the end of the body, after the last event: the connection can be used again then
_BUSY = (409, 429)
_TIMED_OUT = (408, 504, 524)  # on the way to or from the model, which may have answered all the same
_REFUSED = (400, 422)
# What the SDK would tell any server of this machine; and each header is copied by four layers.
_OF_THE_MACHINE = ("OS", "Arch", "Lang", "Package-Version", "Runtime", "Runtime-Version", "Async", "Retry-Count")
_UNTOLD = tuple(f"X-Stainless-{what}" for what in _OF_THE_MACHINE)
# How to ask: the first that a server takes. One that streams without telling its usage is asked without a stream, for
# what it does not tell is charged at the bound.
_WAYS: tuple[dict[str, Any], ...] = ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}, {})


class OpenAILM(LM):
    """base_url: None for OpenAI's own. api_key: sent to that server and nowhere else. extra: further parameters.

    Raises ModelError for a parameter that may not be added to a request.
    """

    def __init__(self, base_url: str | None, api_key: str, extra: dict[str, Any] | None = None) -> None:
        self._base_url = base_url
        self._api_key = api_key
        self._extra = parameters.checked(extra or {})
        self._client: openai.AsyncOpenAI | None = None
        self._way = 0
        self._headers: dict[str, str | openai.Omit] = {}

    def _connect(self) -> openai.AsyncOpenAI:
        import openai  # half a second: only when something is asked

        if self._client is None:
            self._headers = dict.fromkeys(_UNTOLD, openai.Omit())
            self._client = openai.AsyncOpenAI(
                api_key=self._api_key,
                base_url=self._base_url,
                max_retries=0,
                http_client=_http(tls=not (self._base_url or "").startswith("http://")),
            )
        return self._client

    async def ask(self, request: Request) -> Reply:
        client = self._connect()
        import httpx2
        import openai

        way = self._way
        stream = replies.Stream(request.max_output_tokens)
        try:
            with anyio.move_on_after(request.timeout_s) as scope:
                response = await self._post(client, request, _WAYS[way])
                if not _is_stream(response):
                    return replies.whole(await response.aread(), request.max_output_tokens)
                await _read(response, stream, scope)
            if scope.cancelled_caught and not stream.ended:
                raise self._too_late(request)
        except openai.APIError as error:
            raise self._translate(error, request, way) from None
        except httpx2.HTTPError:
            if not stream.ended:
                raise self._broken() from None
        if stream.error:
            raise OutcomeUnknown(f"{self._where} failed in the midst of its answer: {self._quoted(stream.error)}")
        reply = stream.reply()
        if way == 1 and reply.usage is None and not stream.over:
            self._way = 2
        return reply

    async def _post(self, client: openai.AsyncOpenAI, request: Request, way: dict[str, Any]) -> httpx2.Response:
        import httpx2
        import openai

        body = {**self._extra, **way, "n": 1, "model": request.model, "messages": request.messages}
        if self._base_url is None:
            # OpenAI's newer models refuse max_tokens; other servers may not know its successor. An account may have
            # been set to a dearer tier than the one that calls are bounded by.
            body |= {"max_completion_tokens": request.max_output_tokens, "service_tier": "default"}
        else:
            body["max_tokens"] = request.max_output_tokens
        connect_s = min(CONNECT_S, request.timeout_s / 2)
        # `chat.completions.create` walks request and answer by their type annotations, a third of its time, and checks
        # neither; `replies` checks what it needs. Reading and writing are bounded together, in `ask`.
        response: Any = await client.post(
            "/chat/completions",
            cast_to=httpx2.Response,
            content=json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
            options={"headers": self._headers, "timeout": openai.Timeout(None, connect=connect_s, pool=connect_s)},
            stream=True,
            stream_cls=openai.AsyncStream[Any],
        )
        return response  # what was cast to, and no stream of the SDK's, which would parse each event by its type

    @property
    def _where(self) -> str:
        return self._base_url or "OpenAI"

    def _too_late(self, request: Request) -> ProviderError:
        return OutcomeUnknown(f"{self._where} did not answer within {request.timeout_s:.0f} s")

    def _broken(self) -> ProviderError:
        return OutcomeUnknown(f"the connection to {self._where} broke before the answer was whole")

    def _translate(self, error: openai.APIError, request: Request, way: int) -> ProviderError:
        import openai

        where = self._where
        if isinstance(error, openai.APIConnectionError) and _never_sent(error):
            return ProviderBusy(f"cannot connect to {where}")
        if isinstance(error, openai.APITimeoutError):
            return self._too_late(request)
        if isinstance(error, openai.APIStatusError):
            return self._from_status(error, request, way)
        if isinstance(error, openai.APIConnectionError):
            return self._broken()
        return OutcomeUnknown(f"{where} sent something that is not a chat completion")

    def _from_status(self, error: openai.APIStatusError, request: Request, way: int) -> ProviderError:
        status, where = error.status_code, self._where
        said = self._quoted(str(error.message).removeprefix(f"Error code: {status} - "))
        if status == 401 or status == 403:
            return ProviderRefused(f"{where} refused the API key ({status}): check the key and what it may use")
        if status == 404:
            return ProviderRefused(f"{where} has no model {request.model!r}, or no chat completions there (404)")
        if status in _TIMED_OUT:
            return OutcomeUnknown(f"{where} gave up waiting for the answer ({status})")
        if status in _BUSY or status >= 500:
            return ProviderBusy(f"{where} is busy or failing ({status}): {said}", retry_after=_retry_after(error))
        if status in _REFUSED and self._another_way(error.response.text, request, way):
            return ProviderBusy(f"{where} has to be asked in another way ({status}): {said}", retry_after=0.0)
        return ProviderRefused(f"{where} refused the request ({status}): {said}")

    def _another_way(self, said: str, request: Request, way: int) -> bool:
        """Whether the server refused to stream, and not what a prompt that speaks of streams made it say."""
        for word, next_way in (("stream_options", 1), ("stream", 2)):
            if way < next_way and word in said and not any(word in message["content"] for message in request.messages):
                self._way = max(self._way, next_way)
                return True
        return False

    def _quoted(self, said: str) -> str:
        """A provider's words, as part of an error of one line. The key is taken out before they are cut, and it too."""
        said = said.replace(self._api_key, "***") if self._api_key else said
        return " ".join(replies.clean(said).split())[:300]

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None


def _http(*, tls: bool) -> httpx2.AsyncClient:
    """A client that takes replies of REPLY_BYTES at most; a stream is bounded where it is read.

    Without TLS, most often to a server on this machine, it does not read the system's certificates, 20 ms and more, and
    so follows no redirect, which could lead to where they would be needed. It keeps few idle connections then: the pool
    looks at each of them for every request, which costs more than to connect again.
    """
    import httpx2
    import openai

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for piece in self._stream:
                size += len(piece)
                if size > replies.REPLY_BYTES:
                    raise httpx2.ReadError(f"the reply has more than {replies.REPLY_BYTES:,} bytes")
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def bound(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":  # it would be unpacked without a bound
            raise httpx2.ReadError("the reply is compressed, which was not asked for")
        if not _is_stream(response):
            response.stream = Bounded(response.stream)

    options: dict[str, Any] = {"event_hooks": {"response": [bound]}, "headers": {"Accept-Encoding": "identity"}}
    if not tls:
        limits = httpx2.Limits(max_keepalive_connections=8)
        options |= {"verify": False, "follow_redirects": False, "limits": limits}
    return openai.DefaultAsyncHttpx2Client(**options)


def _is_stream(response: httpx2.Response) -> bool:
    return response.is_success and response.headers.get("content-type", "").lower().startswith("text/event-stream")


async def _read(response: httpx2.Response, stream: replies.Stream, scope: anyio.CancelScope) -> None:
    """Feed the stream until it is over, or the body's end. What comes after the text is not waited for long."""
    # llama.cpp's server hangs up after a stream without a word of it, which the next request would run into.
    kept = response.headers.get("server") != "llama.cpp"
    # However this is left, it closes the connection, unless the body was read to its end.
    async with aclosing(response.aiter_raw()) as pieces:
        async for piece in pieces:
            if stream.done:
                continue
            stream.feed(piece)
            if stream.over or (stream.done and not kept):
                return
            if stream.ended:
                scope.deadline = min(scope.deadline, anyio.current_time() + (DRAIN_S if stream.done else TAIL_S))


def _never_sent(error: BaseException) -> bool:
    """Whether the connection failed before a request could go out."""
    import httpx2

    cause = error.__cause__
    return isinstance(
        cause, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
    )


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds, from a Retry-After of that form (RFC 9110, 10.2.3); with a date, or nothing, we keep our own pace."""
    text = error.response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds < 86_400 else None
