"""Tenants, their keys, their policies and whose tokens they take: for whoever runs the service."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.api_keys import EVERYDAY, Scope
from orchestrator.core.issuers import Issuer
from orchestrator.core.policy_file import MAX_CHARS
from orchestrator.core.tenants import NAME
from orchestrator.server.admin_views import (
    KEY,
    Admin,
    Given,
    KeyView,
    TenantName,
    TenantSummary,
    TenantView,
    The,
    by,
    in_thread,
    summary_of,
    the_tenant,
    view_of,
    view_of_key,
)
from orchestrator.server.paging import Cursor, Limit, Next, cut, read_cursor
from orchestrator.server.problems import Problem, documented, not_found
from orchestrator.server.routes import policies
from orchestrator.server.structure import JsonRoute
from orchestrator.server.tokens import require_usable
from orchestrator.store.registered import KeyRow

router = APIRouter(prefix="/v1/admin", tags=["admin"], route_class=JsonRoute)
router.include_router(policies.router)
KeyId = Annotated[
    str,
    Path(description="a key's id", examples=["abcdefgh2345"], json_schema_extra={"pattern": "^[a-z2-7]{12}$"}),
]


class NewTenant(Given):
    """policy: YAML; without one the tenant may do what the service may."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "acme"}]})

    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    policy: Annotated[str, Field(max_length=MAX_CHARS)] | None = None


class NewKey(Given):
    """label: what it is for; of one label, two keys can live. expires_at: RFC 3339."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"label": "ci", "scopes": ["query", "read"]}]})

    label: Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,62}[!-~])?$")] = "default"
    scopes: list[Scope] = Field(list(EVERYDAY), min_length=1, max_length=5)
    expires_at: Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})] | None = None


class TenantPage(BaseModel):
    tenants: list[TenantSummary]
    next: Next


class MadeKey(KeyView):
    """key: the key itself, which is not to be had again."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**KEY, "status": "live", "key": "al_..."}]})

    key: str


class KeyPage(BaseModel):
    keys: list[KeyView]
    next: Next


# Tenants


@router.get("/tenants", response_model=TenantPage, responses=documented(403, 422, 429, 503))
async def list_tenants(service: The, _admin: Admin, limit: Limit = 50, cursor: Cursor = None) -> dict[str, Any]:
    """All tenants, by name."""
    _, after = ("", "") if cursor is None else read_cursor("tenants", cursor)
    rows = await in_thread(service.registry.tenants, after, limit + 1)
    page, following = cut("tenants", rows, limit, lambda row: (row.created_at, row.name))
    return {"tenants": [summary_of(row) for row in page], "next": following}


@router.post(
    "/tenants", status_code=201, response_model=TenantView, responses=documented(400, 403, 409, 413, 422, 429, 503)
)
async def create_tenant(service: The, admin: Admin, response: Response, new: NewTenant) -> dict[str, Any]:
    """Add a tenant."""
    policy = None if new.policy is None else await in_thread(policies.policy_of, new.policy)
    row = await in_thread(service.registry.add_tenant, new.name, policy, by=by(admin))
    response.headers["Location"] = f"/v1/admin/tenants/{row.name}"
    return view_of(service, row)


@router.get("/tenants/{tenant}", response_model=TenantView, responses=documented(403, 404, 422, 429, 503))
async def get_tenant(service: The, _admin: Admin, tenant: TenantName) -> dict[str, Any]:
    """A tenant, its policy, and whose tokens it takes."""
    return view_of(service, await the_tenant(service, tenant))


@router.post("/tenants/{tenant}/suspend", response_model=TenantView, responses=documented(403, 404, 422, 429, 503))
async def suspend_tenant(service: The, admin: Admin, tenant: TenantName) -> dict[str, Any]:
    """Take none of its keys and tokens from now on. What it has running or waiting is cancelled."""
    await the_tenant(service, tenant)
    await in_thread(service.registry.suspend, tenant, by=by(admin))
    return view_of(service, await the_tenant(service, tenant))


@router.post("/tenants/{tenant}/restore", response_model=TenantView, responses=documented(403, 404, 422, 429, 503))
async def restore_tenant(service: The, admin: Admin, tenant: TenantName) -> dict[str, Any]:
    """Undo a suspension."""
    await the_tenant(service, tenant)
    await in_thread(service.registry.restore, tenant, by=by(admin))
    return view_of(service, await the_tenant(service, tenant))


# Keys


@router.get("/tenants/{tenant}/keys", response_model=KeyPage, responses=documented(403, 404, 422, 429, 503))
async def list_keys(
    service: The, _admin: Admin, tenant: TenantName, limit: Limit = 50, cursor: Cursor = None
) -> dict[str, Any]:
    """All keys that the tenant ever had, the oldest first, without their secrets."""
    await the_tenant(service, tenant)
    after = ("", "") if cursor is None else read_cursor("keys", cursor)
    # In the order of bytes, as the cursor is compared: not every database has it.
    rows = sorted(await in_thread(service.registry.keys, tenant), key=_place)
    page, following = cut("keys", [row for row in rows if _place(row) > after], limit, _place)
    return {"keys": [view_of_key(row) for row in page], "next": following}


def _place(row: KeyRow) -> tuple[str, str]:
    return row.created_at, row.id


@router.post(
    "/tenants/{tenant}/keys",
    status_code=201,
    response_model=MadeKey,
    responses=documented(400, 403, 404, 409, 413, 422, 429, 503),
)
async def create_key(service: The, admin: Admin, response: Response, tenant: TenantName, new: NewKey) -> dict[str, Any]:
    """Make a key. It is shown here, and never again."""
    await the_tenant(service, tenant)
    wanted = {"label": new.label, "scopes": new.scopes, "expires_at": new.expires_at, "by": by(admin)}
    row, text = await in_thread(service.registry.create_key, tenant, **wanted)
    response.headers["Cache-Control"] = "no-store"
    return {**view_of_key(row), "key": text}


@router.delete(
    "/tenants/{tenant}/keys/{key}",
    status_code=204,
    response_class=Response,
    responses=documented(403, 404, 422, 429, 503),
)
async def revoke_key(service: The, admin: Admin, tenant: TenantName, key: KeyId) -> None:
    """Let nobody in with this key from now on, nor with a session that it began."""
    if key not in {row.id for row in await in_thread(service.registry.keys, tenant)}:
        raise not_found("key")
    await in_thread(service.registry.revoke_key, tenant, key, by=by(admin))


# Whose tokens


@router.put(
    "/tenants/{tenant}/issuer", response_model=TenantView, responses=documented(400, 403, 404, 409, 413, 422, 429, 503)
)
async def set_issuer(service: The, admin: Admin, tenant: TenantName, issuer: Issuer) -> dict[str, Any]:
    """Let in whoever has a token of this issuer, for this audience. It replaces the one of before."""
    await the_tenant(service, tenant)
    try:
        await in_thread(require_usable, issuer)
    except ValueError as error:
        raise Problem(422, "bad-request", str(error)) from None
    await in_thread(service.registry.set_issuer, tenant, issuer, by=by(admin))
    return view_of(service, await the_tenant(service, tenant))


@router.delete(
    "/tenants/{tenant}/issuer", status_code=204, response_class=Response, responses=documented(403, 404, 422, 429, 503)
)
async def remove_issuer(service: The, admin: Admin, tenant: TenantName) -> None:
    """Take no tokens for this tenant any more."""
    await the_tenant(service, tenant)
    await in_thread(service.registry.set_issuer, tenant, None, by=by(admin))
