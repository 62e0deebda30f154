"""What every route has at hand, and who asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from starlette.requests import HTTPConnection

from orchestrator.server.problems import not_found

if TYPE_CHECKING:
    from orchestrator.auditing import Books
    from orchestrator.server.desk import Desk
    from orchestrator.server.feed import Feed
    from orchestrator.server.metrics import Metrics
    from orchestrator.server.under_way import UnderWay
    from orchestrator.settings import ServerSettings
    from orchestrator.store.registry import Registry
    from orchestrator.wiring import Platform


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. asker: the id of a key, or the issuer's word for a person. via: a session is a browser's."""

    tenant: str
    scopes: frozenset[str]
    asker: str
    via: Literal["key", "token", "session"]


@dataclass(slots=True)
class Service:
    """One running service, as `app.state.service`."""

    home: Path
    settings: ServerSettings
    platform: Platform
    books: Books
    registry: Registry
    desk: Desk
    under_way: UnderWay
    feed: Feed
    metrics: Metrics
    secure: bool  # it is reached over TLS, or on this machine alone: cookies are for secure connections

    def require_own(self, principal: Principal, tenant: str | None, what: str = "query") -> None:
        """That it is this tenant's. tenant: whose it is, None where there is none. Raises Problem, alike for both."""
        if tenant != principal.tenant:
            raise not_found(what)


def the_service(connection: HTTPConnection) -> Service:
    return cast("Service", connection.app.state.service)


async def of_request(connection: HTTPConnection) -> Service:
    """For routes: a dependency that is no coroutine is run in a thread, and a request waits for that."""
    return the_service(connection)
