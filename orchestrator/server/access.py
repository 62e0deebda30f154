"""Who is let in: an API key, a token of the tenant's own issuer, or a browser's session, and what each may do.

Whatever is wrong with a credential, the answer is the same. Every authenticated answer says how much of the tenant's
rate is left (draft-ietf-httpapi-ratelimit-headers-10).
"""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address, ip_network
from typing import Annotated, Literal, cast
from urllib.parse import urlsplit

import anyio.to_thread
from fastapi import Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from orchestrator.core.api_keys import Scope
from orchestrator.core.errors import AirlockError
from orchestrator.server.problems import Problem, come_again, problem_of
from orchestrator.server.service import Principal, Service, the_service
from orchestrator.server.sessions import Session, Sessions, cookie_name
from orchestrator.server.tokens import Tokens
from orchestrator.store.registered import KeyRow

_GUARDED = ("/v1/", "/metrics")  # paths of whoever has a credential
_SAFE = ("GET", "HEAD", "OPTIONS")
_PER = 60  # seconds of the rate's window
LOGINS = 30  # of one address that may fail in a minute
_LEFT = "airlock.rate"  # in a connection's state: the headers of its answer

_bearer = HTTPBearer(
    auto_error=False, scheme_name="bearer", description="An API key, or a token of the tenant's issuer."
)
_cookie = APIKeyCookie(
    name=cookie_name(secure=True),
    auto_error=False,
    scheme_name="session",
    description="A browser's session. Whatever changes something also takes its token, in the header X-CSRF-Token.",
)


class Gate:
    """What one service knows of who is let in."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.sessions = Sessions(service.platform.vault.derived("sessions"))
        self._tokens = Tokens(service.registry)
        self._rate = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._item = RateLimitItemPerMinute(service.settings.requests_minute)
        self._failed = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._logins = RateLimitItemPerMinute(LOGINS)

    async def principal(self, connection: HTTPConnection) -> Principal:
        """Who asks. Raises Problem: 401 for nobody, 403 for a suspended tenant's."""
        given = connection.headers.getlist("authorization")
        found = await self._by_header(given) if given else await self._by_session(connection)
        if found is None:
            raise unauthorized()
        principal, suspended = found
        if suspended:
            raise Problem(403, "suspended", "the tenant is suspended: ask whoever runs this service")
        return principal

    async def _by_header(self, given: list[str]) -> tuple[Principal, bool] | None:
        scheme, _, text = given[0].partition(" ")
        if len(given) != 1 or scheme.lower() != "bearer":
            return None
        if text.startswith("eyJ"):
            checked = await self._tokens.check(text)
            return (checked[0], checked[1].suspended_at is not None) if checked else None
        row = await anyio.to_thread.run_sync(self._service.registry.check_key, text)
        return self._used(row, "key") if row else None

    async def _by_session(self, connection: HTTPConnection) -> tuple[Principal, bool] | None:
        session = self.session(connection)
        row = await anyio.to_thread.run_sync(self._service.registry.live_key, session.key_id) if session else None
        return self._used(row, "session") if row else None

    def _used(self, row: KeyRow, via: Literal["key", "session"]) -> tuple[Principal, bool]:
        self._service.registry.touch(row.id)
        return Principal(row.tenant, frozenset(row.scopes), row.id, via), row.suspended

    def session(self, connection: HTTPConnection) -> Session | None:
        """The session that a browser says it has; that its key lives is another question."""
        value = connection.cookies.get(cookie_name(secure=self._service.secure), "")
        return self.sessions.open(value, time.time())

    def require_same_page(self, connection: HTTPConnection) -> None:
        """Raises Problem where a session would change something, and it is not the session's own page that asks."""
        session = self.session(connection)
        sent = connection.headers.get("x-csrf-token", "")
        if session is None or not hmac.compare_digest(session.csrf.encode(), sent.encode("utf-8", "replace")):
            raise Problem(403, "csrf", "send the session's token, which GET /v1/session tells, in X-CSRF-Token")
        require_own_origin(connection)

    def count(self, connection: HTTPConnection, tenant: str) -> None:
        """One request of the tenant's. Raises Problem (429) where it is one too many."""
        permitted = self._rate.hit(self._item, tenant)
        until, left = self._rate.get_window_stats(self._item, tenant)
        seconds = max(1, math.ceil(until - time.time()))
        connection.scope.setdefault("state", {})[_LEFT] = {
            "RateLimit-Policy": f'"minute";q={self._item.amount};w={_PER}',
            "RateLimit": f'"minute";r={left};t={seconds}',
        }
        if not permitted:
            limit = f"the tenant may make {self._item.amount:,} requests a minute"
            raise come_again(429, "rate-limited", f"{limit}: come again in {seconds} s", seconds)

    async def log_in(self, connection: HTTPConnection, key: str) -> KeyRow | None:
        """The live key that a session can begin with. Raises Problem (429) where too many were wrong before it.

        A right key is always taken: behind a proxy everybody has one address, and who fails there locks nobody out.
        """
        row = await anyio.to_thread.run_sync(self._service.registry.check_key, key)
        address = _network(connection)
        if row is None and not self._failed.hit(self._logins, address):
            until = self._failed.get_window_stats(self._logins, address).reset_time
            seconds = max(1, math.ceil(until - time.time()))
            raise come_again(429, "too-many-logins", f"too many logins have failed: come again in {seconds} s", seconds)
        return row


def _network(connection: HTTPConnection) -> str:
    """Whose the client's address is: of IPv6 one has 2**64 of them, at the least."""
    host = connection.client.host if connection.client else ""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return str(ip_network((address, 64), strict=False)) if address.version == 6 else host


def the_gate(connection: HTTPConnection) -> Gate:
    """Of this service; made at the first request."""
    state = connection.app.state
    if not hasattr(state, "gate"):
        state.gate = Gate(the_service(connection))
    return state.gate


def allowed(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """A dependency of routes behind `Door`: who asks, who has this scope. Raises Problem (403, insufficient-scope)."""

    async def check(
        request: Request,
        _key: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
        _session: Annotated[str | None, Security(_cookie)] = None,
    ) -> Principal:
        principal = principal_of(request)
        if scope not in principal.scopes:
            needed = f'Bearer error="insufficient_scope", scope="{scope}"'
            text = f"this needs the scope {scope!r}: ask for a key that has it"
            raise Problem(403, "insufficient-scope", text, headers={"WWW-Authenticate": needed})
        return principal

    return check


def principal_of(connection: HTTPConnection) -> Principal:
    """Who `Door` has let in."""
    return cast("Principal", connection.scope["state"]["principal"])


def unauthorized() -> Problem:
    text = "this needs a valid API key, token or session"
    return Problem(401, "unauthorized", text, headers={"WWW-Authenticate": "Bearer"})


def require_own_origin(connection: HTTPConnection) -> None:
    """Raises Problem where a browser says that another site's page asks."""
    site, origin = connection.headers.get("sec-fetch-site"), connection.headers.get("origin")
    # By host alone: what ends TLS before us may make http of https.
    own = origin is None or _host(origin) == connection.headers.get("host", "").lower()
    if site not in (None, "same-origin") or not own:
        raise Problem(403, "csrf", "this is taken from the service's own pages alone")


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


class Door:
    """ASGI middleware of the application: who asks is known before anything of a body is read.

    What `Gate.count` found is in every answer, whoever makes that. answer: how a request's client is told a problem.
    """

    def __init__(self, app: ASGIApp, answer: Callable[[Request, Problem], Response]) -> None:
        self._app, self._answer = app, answer

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(scope.get("state", {}).get(_LEFT, {}))
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(_GUARDED):
            try:
                await _let_in(Request(scope))
            except (Problem, AirlockError) as error:
                problem = error if isinstance(error, Problem) else problem_of(error)
                await self._answer(Request(scope), problem)(scope, receive, told)
                return
        await self._app(scope, receive, told)


async def _let_in(connection: HTTPConnection) -> None:
    """Raises Problem: 401, 403 (suspended, csrf), 429; StoreError."""
    gate = the_gate(connection)
    principal = await gate.principal(connection)
    connection.scope.setdefault("state", {})["principal"] = principal  # for the routes, and the log
    gate.count(connection, principal.tenant)
    if principal.via == "session" and connection.scope.get("method", "GET") not in _SAFE:
        gate.require_same_page(connection)
