"""Any server that speaks OpenAI's chat completions, through the `openai` SDK. One attempt an `ask`, no retries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import anyio

from orchestrator.core.errors import OutcomeUnknown, ProviderBusy, ProviderError, ProviderRefused
from orchestrator.lm.base import LM, Reply, Request, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2
    import openai

CONNECT_S = 10.0  # a connection that is not made costs nothing, so it may be tried again
REPLY_BYTES = 16 << 20
_BUSY = (408, 409, 429)


class OpenAILM(LM):
    """base_url: None for OpenAI's own. api_key: sent to that server and nowhere else. extra: further body fields."""

    def __init__(self, base_url: str | None, api_key: str, extra: dict[str, Any] | None = None) -> None:
        self._base_url = base_url
        self._api_key = api_key
        self._extra = extra
        self._client: openai.AsyncOpenAI | None = None

    def _connect(self) -> openai.AsyncOpenAI:
        import openai  # half a second: only when something is asked

        if self._client is None:
            self._client = openai.AsyncOpenAI(
                api_key=self._api_key,
                base_url=self._base_url,
                max_retries=0,
                http_client=_http(tls=not (self._base_url or "").startswith("http://")),
            )
        return self._client

    async def ask(self, request: Request) -> Reply:
        client = self._connect()
        import openai

        # OpenAI's newer models refuse max_tokens; other servers may not know its successor.
        cap = "max_completion_tokens" if self._base_url is None else "max_tokens"
        body: dict[str, Any] = {**(self._extra or {}), cap: request.max_output_tokens, "n": 1}
        try:
            # The SDK's time-out is one of a single read: a server that sends a byte now and then would go on for ever.
            with anyio.fail_after(request.timeout_s):
                # `chat.completions.create` walks request and answer by their type annotations, a third of its time,
                # and checks neither; `_reply` checks what it needs.
                completion = await client.post(
                    "/chat/completions",
                    cast_to=object,
                    body={**body, "model": request.model, "messages": list(request.messages)},
                    options={
                        "timeout": openai.Timeout(request.timeout_s, connect=min(CONNECT_S, request.timeout_s / 2))
                    },
                )
        except TimeoutError:
            raise self._too_late(request) from None
        except openai.APIError as error:
            raise self._translate(error, request) from None
        except (
            ValueError,
            RecursionError,
        ):  # a body that is not JSON, or nested without end, though its status was 200
            raise OutcomeUnknown("the provider sent something that is not a chat completion") from None
        return _reply(completion)

    def _too_late(self, request: Request) -> ProviderError:
        return OutcomeUnknown(f"{self._base_url or 'OpenAI'} did not answer within {request.timeout_s:.0f} s")

    def _translate(self, error: openai.APIError, request: Request) -> ProviderError:
        import openai

        where = self._base_url or "OpenAI"
        if isinstance(error, openai.APIConnectionError) and _never_sent(error):
            return ProviderBusy(f"cannot connect to {where}")
        if isinstance(error, openai.APITimeoutError):
            return self._too_late(request)
        if isinstance(error, openai.APIStatusError):
            return self._from_status(error, where, request.model)
        if isinstance(error, openai.APIConnectionError):
            return OutcomeUnknown(f"the connection to {where} broke before the answer was whole")
        return OutcomeUnknown(f"{where} sent something that is not a chat completion")

    def _from_status(self, error: openai.APIStatusError, where: str, model: str) -> ProviderError:
        status = error.status_code
        said = str(error.message).removeprefix(f"Error code: {status} - ")
        said = said.replace(self._api_key, "***") if self._api_key else said  # before it is cut, and the key with it
        said = " ".join(_clean(said).split())[:300]
        if status == 401 or status == 403:
            return ProviderRefused(f"{where} refused the API key ({status}): check the key and what it may use")
        if status == 404:
            return ProviderRefused(f"{where} has no model {model!r}, or no chat completions there (404)")
        if status in _BUSY or status >= 500:
            return ProviderBusy(f"{where} is busy or failing ({status}): {said}", retry_after=_retry_after(error))
        return ProviderRefused(f"{where} refused the request ({status}): {said}")

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None


def _http(*, tls: bool) -> httpx2.AsyncClient:
    """A client that takes replies of REPLY_BYTES at most.

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
                if size > REPLY_BYTES:
                    raise httpx2.ReadError(f"the reply has more than {REPLY_BYTES:,} bytes")
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def bound(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":  # it would be unpacked without a bound
            raise httpx2.ReadError("the reply is compressed, which was not asked for")
        response.stream = Bounded(response.stream)

    options: dict[str, Any] = {"event_hooks": {"response": [bound]}, "headers": {"Accept-Encoding": "identity"}}
    if not tls:
        limits = httpx2.Limits(max_keepalive_connections=8)
        options |= {"verify": False, "follow_redirects": False, "limits": limits}
    return openai.DefaultAsyncHttpx2Client(**options)


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


def _reply(completion: Any) -> Reply:
    """Checked by hand: it is whatever JSON the server sent."""
    if isinstance(completion, str):  # the SDK leaves what is not labelled as JSON alone; it may be JSON all the same
        try:
            completion = json.loads(completion)
        except (ValueError, RecursionError):
            raise OutcomeUnknown("the provider sent something that is not a chat completion") from None
    choices: Any = _get(completion, "choices")
    if not isinstance(choices, list) or not choices:
        raise OutcomeUnknown("the provider sent a completion without a choice")
    choice: Any = cast("list[Any]", choices)[0]
    message: Any = _get(choice, "message")
    if message is None:
        raise OutcomeUnknown("the provider sent a choice without a message")
    text = _get(message, "content")
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise OutcomeUnknown("the provider sent a completion whose content is not text")
    reported: Any = _get(completion, "usage")
    tokens = [_get(reported, name) for name in ("prompt_tokens", "completion_tokens")]
    whole = [count for count in tokens if type(count) is int and 0 <= count < 10**12]
    usage = Usage(whole[0], whole[1]) if len(whole) == 2 else None
    return Reply(_clean(text), _clean(str(_get(choice, "finish_reason") or "stop"))[:100], usage)


def _clean(text: str) -> str:
    """Half of a surrogate pair is valid in JSON, and is no text."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _get(value: Any, name: str) -> Any:
    return cast("dict[str, Any]", value).get(name) if isinstance(value, dict) else None
