"""Tenants and keys as the admin's routes show them, and what these routes share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from fastapi import Depends, Path
from pydantic import BaseModel, ConfigDict

from orchestrator.core.issuers import Issuer
from orchestrator.core.policy_file import policy_text, policy_values
from orchestrator.core.tenants import NAME
from orchestrator.server.access import allowed
from orchestrator.server.few import Few
from orchestrator.server.openapi import Moment
from orchestrator.server.problems import not_found
from orchestrator.server.service import Principal, Service, of_request
from orchestrator.store.registered import KeyRow, Part, TenantRow

T = TypeVar("T")
TenantName = Annotated[
    str, Path(description="a tenant's name", examples=["acme"], json_schema_extra={"pattern": f"^{NAME}$"})
]
Admin = Annotated[Principal, Depends(allowed("admin"))]
The = Annotated[Service, Depends(of_request)]


# With nothing that is null: the document leaves that out.
_SUMMARY: dict[str, Any] = {
    "name": "acme",
    "state": "suspended",
    "created_at": "2026-11-26T01:02:03.004Z",
    "suspended_at": "2026-11-27T01:02:03.004Z",
    "policy_sha256": "5e" * 32,
    "damaged": [],
}
_VIEW: dict[str, Any] = {
    **_SUMMARY,
    "policy": {"models": {"root": ["*"]}, "time": {"query": "15 min"}},
    "policy_yaml": "models:\n  root: ['*']\ntime:\n  query: 15 min\n",
    "effective_policy_sha256": "9a" * 32,
    "issuer": {"issuer": "https://login.example/", "audience": "acme", "algorithm": "RS256", "scopes": ["read"]},
}
KEY: dict[str, Any] = {
    "id": "abcdefgh2345",
    "status": "revoked",
    "label": "ci",
    "scopes": ["query", "read"],
    "created_at": "2026-11-26T01:02:03.004Z",
    "expires_at": "2027-11-26T01:02:03.004Z",
    "revoked_at": "2026-11-28T01:02:03.004Z",
    "used_at": "2026-11-27T01:02:03.004Z",
}


class Given(Few):
    model_config = ConfigDict(extra="forbid", strict=True)


class TenantSummary(BaseModel):
    """policy_sha256: of the tenant's own; null where it has none.

    damaged: what of it cannot be read, and is null here. Without its policy its queries are refused, without its issuer
    its tokens.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_SUMMARY]})

    name: str
    state: Literal["active", "suspended"]
    created_at: Moment
    suspended_at: Moment | None
    policy_sha256: str | None
    damaged: list[Part]


class TenantView(TenantSummary):
    """policy: the tenant's own, as its file would be read; policy_yaml: as that file, to be changed and sent back.
    effective_policy_sha256: of what it may, as it is narrowed by the service's own; null where that is damaged.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_VIEW]})

    policy: dict[str, dict[str, Any]] | None
    policy_yaml: str | None
    effective_policy_sha256: str | None
    issuer: Issuer | None


class KeyView(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [KEY]})

    id: str
    status: Literal["live", "expired", "revoked"]
    label: str
    scopes: list[str]
    created_at: Moment
    expires_at: Moment | None
    revoked_at: Moment | None
    used_at: Moment | None


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
    policy = None if "policy" in row.damaged else row.policy
    return {
        "name": row.name,
        "state": "suspended" if row.suspended_at else "active",
        "created_at": row.created_at,
        "suspended_at": row.suspended_at,
        "policy_sha256": policy.sha256() if policy else None,
        "damaged": list(row.damaged),
    }


def view_of(service: Service, row: TenantRow) -> dict[str, Any]:
    known = "policy" not in row.damaged
    policy, platform = row.policy if known else None, service.platform.policy
    return {
        **summary_of(row),
        "policy": policy_values(policy) if policy else None,
        "policy_yaml": policy_text(policy) if policy else None,
        "effective_policy_sha256": (platform.narrowed(policy) if policy else platform).sha256() if known else None,
        "issuer": None if "issuer" in row.damaged else row.issuer,
    }


def view_of_key(row: KeyRow) -> dict[str, Any]:
    return {name: list(row.scopes) if name == "scopes" else getattr(row, name) for name in KeyView.model_fields}
