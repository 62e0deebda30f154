"""Tenants and keys as the admin's routes show them, and what these routes share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from fastapi import Depends, Path
from pydantic import BaseModel, ConfigDict

from orchestrator.core.issuers import Issuer
from orchestrator.core.tenants import NAME
from orchestrator.server.access import allowed
from orchestrator.server.few import Few
from orchestrator.server.problems import not_found
from orchestrator.server.service import Principal, Service, the_service
from orchestrator.store.registered import KeyRow, TenantRow

T = TypeVar("T")
TenantName = Annotated[
    str, Path(description="a tenant's name", examples=["acme"], json_schema_extra={"pattern": f"^{NAME}$"})
]
Admin = Annotated[Principal, Depends(allowed("admin"))]
The = Annotated[Service, Depends(the_service)]


class Given(Few):
    model_config = ConfigDict(extra="forbid", strict=True)


class TenantSummary(BaseModel):
    """policy_sha256: of the tenant's own; null where it has none. Times in RFC 3339."""

    name: str
    state: Literal["active", "suspended"]
    created_at: str
    suspended_at: str | None
    policy_sha256: str | None


class TenantView(TenantSummary):
    """effective_policy_sha256: of what it may, as it is narrowed by the service's own."""

    policy: dict[str, Any] | None
    effective_policy_sha256: str
    issuer: Issuer | None


class KeyView(BaseModel):
    id: str
    status: Literal["live", "expired", "revoked"]
    label: str
    scopes: list[str]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    used_at: str | None


async def in_thread(work: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """In a thread: it blocks."""
    return await anyio.to_thread.run_sync(partial(work, *arguments, **named))


async def the_tenant(service: Service, name: str) -> TenantRow:
    """Raises Problem."""
    row = await in_thread(service.registry.tenant, name)
    if row is None:
        raise not_found("tenant")
    return row


def by(admin: Principal) -> str:
    """For the record, which the tenant can read: not whose key it is."""
    return f"{'token' if admin.via == 'token' else 'key'} {admin.asker}"


def summary_of(row: TenantRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "state": "suspended" if row.suspended_at else "active",
        "created_at": row.created_at,
        "suspended_at": row.suspended_at,
        "policy_sha256": row.policy.sha256() if row.policy else None,
    }


def view_of(service: Service, row: TenantRow) -> dict[str, Any]:
    platform = service.platform.policy
    return {
        **summary_of(row),
        "policy": row.policy.model_dump(mode="json") if row.policy else None,
        "effective_policy_sha256": (platform.narrowed(row.policy) if row.policy else platform).sha256(),
        "issuer": row.issuer,
    }


def view_of_key(row: KeyRow) -> dict[str, Any]:
    return {name: list(row.scopes) if name == "scopes" else getattr(row, name) for name in KeyView.model_fields}
