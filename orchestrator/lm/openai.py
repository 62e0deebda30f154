"""Any server that speaks OpenAI's chat completions. One attempt an `ask`, no retries.

Replies are streamed, so that one without end can be ended: by closing the connection, which is what a provider sees.
"""

from __future__ import annotations

import io
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio

from orchestrator.core import address
from orchestrator.core.errors import OutcomeUnknown, ProviderBusy, ProviderError, ProviderRefused
from orchestrator.lm import parameters, replies
from orchestrator.lm.base import LM, Reply, Request

if TYPE_CHECKING:
    import aiohttp
    import yarl

OPENAI = "https://api.openai.com/v1"
CONNECT_S = 10.0  # a connection that is not made costs nothing, so it may be tried again
TAIL_S = 5.0  # for the usage, after the text has ended; for the reason, after a status that says no
DRAIN_S = 0.1  # for the end of the body, after the last event: the connection can be used again then
REASON_BYTES = 1 << 16
_BUSY = (409, 429)
_TIMED_OUT = (408, 504, 524)  # on the way to or from the model, which may have answered all the same
_REFUSED = (400, 422)
MOST_SAID = 300  # characters of a provider's words
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
        self._secrets = [text for text in (api_key, address.secret(base_url or "")) if text]
        self._session: aiohttp.ClientSession | None = None
        self._url: yarl.URL | None = None
        self._way = 0

    async def ask(self, request: Request) -> Reply:
        try:
            return await self._ask(request)
        except ProviderError as error:
            error.server = error.server or self._where
            raise

    async def _ask(self, request: Request) -> Reply:
        import aiohttp  # a tenth of a second: only when something is asked

        way = self._way
        stream = replies.Stream(request.max_output_tokens)
        try:
            with anyio.move_on_after(request.timeout_s) as scope:
                response = await self._post(request, _WAYS[way])
                try:
                    if not response.ok or response.status >= 300:
                        raise self._refusal(response, await _reason(response), request, way)
                    if _is_packed(response):  # it would be unpacked without a bound
                        raise OutcomeUnknown(f"{self._where} sent a compressed reply, which was not asked for")
                    if not _is_stream(response):
                        return replies.whole(await _whole(response), request.max_output_tokens)
                    await _read(response, stream, scope)
                finally:
                    response.close()  # at once, unless it was read to its end: then the connection is kept
            if scope.cancelled_caught and not stream.ended:
                raise OutcomeUnknown(f"{self._where} did not answer within {request.timeout_s:.0f} s")
        except aiohttp.ClientError as error:
            if not stream.ended:
                raise self._translate(error) from None
        if stream.error:
            raise OutcomeUnknown(f"{self._where} failed in the midst of its answer: {self._quoted(stream.error)}")
        reply = stream.reply()
        if way == 1 and reply.usage is None and not stream.over:
            self._way = 2
        return reply

    async def _post(self, request: Request, way: dict[str, Any]) -> aiohttp.ClientResponse:
        import aiohttp

        session, url = self._connect()
        body = {**self._extra, **way, "n": 1, "model": request.model, "messages": request.messages}
        if self._base_url is None:
            # OpenAI's newer models refuse max_tokens; other servers may not know its successor. An account may have
            # been set to a dearer tier than the one that calls are bounded by.
            body |= {"max_completion_tokens": request.max_output_tokens, "service_tier": "default"}
        else:
            body["max_tokens"] = request.max_output_tokens
        connect_s = min(CONNECT_S, request.timeout_s / 2)
        return await session.post(
            url,
            data=io.BytesIO(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")),
            allow_redirects=False,
            # Sending and reading are bounded together, in `ask`.
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_s),
        )

    def _connect(self) -> tuple[aiohttp.ClientSession, yarl.URL]:
        """Raises ProviderRefused."""
        if self._session is None or self._url is None:
            import yarl

            from orchestrator.lm.session import open_session

            try:
                self._url = yarl.URL(self._base_url or OPENAI) / "chat" / "completions"
            except ValueError:
                raise ProviderRefused(f"{self._where} is not the address of a server: write it again") from None
            self._session = open_session(self._url, self._api_key)
        return self._session, self._url

    @property
    def _where(self) -> str:
        return address.shown(self._base_url) if self._base_url else "OpenAI"

    def _translate(self, error: aiohttp.ClientError) -> ProviderError:
        import aiohttp

        from orchestrator.lm.session import never_sent

        if isinstance(error, aiohttp.InvalidURL):
            return ProviderRefused(f"{self._where} is not the address of a server: write it again")
        if isinstance(error, aiohttp.ClientConnectorCertificateError):  # which no further attempt will change
            remedy = "mend the address, or name its authority's file in SSL_CERT_FILE"
            return ProviderRefused(f"nobody here trusts the certificate of {self._where}: {remedy}")
        if never_sent(error):
            return ProviderBusy(f"cannot connect to {self._where}")
        return OutcomeUnknown(f"the connection to {self._where} broke before the answer was whole")

    def _refusal(self, response: aiohttp.ClientResponse, reason: str, request: Request, way: int) -> ProviderError:
        status, where = response.status, self._where
        said = self._quoted(replies.reason(reason)) or "it gives no reason"
        if status == 401 or status == 403:
            return ProviderRefused(f"{where} refused the API key ({status}): check the key and what it may use")
        if status == 404:
            return ProviderRefused(f"{where} has no model {request.model!r}, or no chat completions there (404)")
        if status in _TIMED_OUT:
            return OutcomeUnknown(f"{where} gave up waiting for the answer ({status})")
        if status in _BUSY or status >= 500:
            return ProviderBusy(f"{where} is busy or failing ({status}): {said}", retry_after=_retry_after(response))
        if status in _REFUSED and self._another_way(reason, request, way):
            return ProviderBusy(f"{where} has to be asked in another way ({status}): {said}", retry_after=0.0)
        if status < 400:
            return ProviderRefused(f"{where} sends its callers elsewhere ({status}): name the server itself")
        return ProviderRefused(f"{where} refused the request ({status}): {said}")

    def _another_way(self, reason: str, request: Request, way: int) -> bool:
        """Whether the server refused to stream, and not what a prompt that speaks of streams made it say."""
        for word, next_way in (("stream_options", 1), ("stream", 2)):
            if way < next_way and word in reason and not any(word in each["content"] for each in request.messages):
                self._way = max(self._way, next_way)
                return True
        return False

    def _quoted(self, said: str) -> str:
        """A provider's words, as part of an error of one line. What is secret is taken out before they are cut.

        They are cut between two of them: half of somebody else's key would not be known for one when it is recorded.
        """
        for secret in self._secrets:
            said = said.replace(secret, "***")
        line = " ".join(replies.clean(said).split())
        return line if len(line) <= MOST_SAID else line[: MOST_SAID + 1].rpartition(" ")[0] + " ..."

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    return response.headers.get("Content-Type", "").lower().startswith("text/event-stream")


def _is_packed(response: aiohttp.ClientResponse) -> bool:
    return response.headers.get("Content-Encoding", "identity") != "identity"


async def _read(response: aiohttp.ClientResponse, stream: replies.Stream, scope: anyio.CancelScope) -> None:
    """Feed the stream until it is over, or the body's end. What comes after the text is not waited for long."""
    async for piece in response.content.iter_any():
        if stream.done:
            continue
        stream.feed(piece)
        if stream.over:
            return
        if stream.ended:
            scope.deadline = min(scope.deadline, anyio.current_time() + (DRAIN_S if stream.done else TAIL_S))


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > replies.REPLY_BYTES:
            raise OutcomeUnknown(f"the reply has more than {replies.REPLY_BYTES:,} bytes")
    return bytes(body)


async def _reason(response: aiohttp.ClientResponse) -> str:
    """What comes with a status that says no: should this break, or not end, the status is known all the same."""
    import aiohttp

    reason = bytearray()
    with suppress(aiohttp.ClientError), anyio.move_on_after(TAIL_S):
        async for piece in response.content.iter_any():
            reason += piece
            if len(reason) > REASON_BYTES:
                break
    return "" if _is_packed(response) else reason.decode("utf-8", "replace")


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds, from a Retry-After of that form (RFC 9110, 10.2.3); with a date, or nothing, we keep our own pace."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 86_400 else None
