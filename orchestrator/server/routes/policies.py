"""Policies of tenants: whether a text is one, what it would change, and putting it in force."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator import settings
from orchestrator.core.errors import PolicyError
from orchestrator.core.policy import Policy
from orchestrator.core.policy_changes import changes
from orchestrator.core.policy_file import MAX_CHARS, parse_policy
from orchestrator.core.units import usd
from orchestrator.server.admin_views import (
    Admin,
    Given,
    TenantName,
    TenantView,
    The,
    by,
    in_thread,
    the_tenant,
    view_of,
)
from orchestrator.server.problems import Problem, documented
from orchestrator.server.structure import JsonRoute, require_little_structure
from orchestrator.store import ledger
from orchestrator.store.journal import Connection

router = APIRouter(route_class=JsonRoute)
MOST_FAULTS = 50  # of one policy that are told
_MOST_BODY = 8 * MAX_CHARS  # bytes; JSON may write one character as six, or as twelve
_YAML = ("application/yaml", "application/x-yaml", "text/yaml")
_EXAMPLE = (settings.data_folder("policies") / "default.yaml").read_text(encoding="utf-8")
_FAULT = re.compile(r"^policy:([0-9]+): (.*)$", re.MULTILINE)


class PolicyText(Given):
    """A policy as a file has it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"yaml": _EXAMPLE}]})

    yaml: Annotated[str, Field(max_length=MAX_CHARS)]


class Fault(BaseModel):
    """line: of the policy's text, from 1 on."""

    line: int = Field(examples=[2])
    what: str = Field(serialization_alias="is", examples=["models.root: has to be a list of names"])


class Validity(BaseModel):
    valid: bool = Field(examples=[True])
    sha256: str | None = Field(examples=["5e" * 32])
    faults: list[Fault] = Field(examples=[[]])


class KeyChange(BaseModel):
    """change: of what the tenant may; other: in part narrower, in part wider. beyond_platform: the policy says more
    than the service permits, which has no effect.
    """

    key: str = Field(examples=["time.query"])
    now: Any = Field(examples=["15 min"])
    then: Any = Field(examples=["5 min"])
    change: Literal["none", "narrower", "wider", "other"] = Field(examples=["narrower"])
    beyond_platform: bool = Field(examples=[False])


class Spending(BaseModel):
    """over: it is above the new limit already; nothing more can be spent."""

    spent_usd: str = Field(examples=["0.75"])
    held_usd: str = Field(examples=["0.00"])
    limit_usd: str = Field(examples=["20.00"])
    over: bool = Field(examples=[False])


class DryRun(BaseModel):
    """effective_sha256: of what is in force then, which is no wider than the service's own policy."""

    sha256: str = Field(examples=["5e" * 32])
    effective_sha256: str = Field(examples=["5e" * 32])
    changes: list[KeyChange]
    day: Spending
    month: Spending


async def _text(request: Request) -> str:
    """A policy's text: the body as YAML, or `yaml` in JSON. Raises Problem, RequestValidationError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (*_YAML, "application/json"):
        raise Problem(415, "unsupported-media-type", "send the policy as application/yaml, or as application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BODY:
            raise _too_large()
    if kind == "application/json":
        require_little_structure(body)
        try:
            return PolicyText.model_validate_json(bytes(body)).yaml
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False, include_input=False)
            raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise Problem(400, "bad-request", "the policy is not UTF-8") from None
    if len(text) > MAX_CHARS:
        raise _too_large()
    return text


def _too_large() -> Problem:
    return Problem(413, "too-large", f"a policy has {MAX_CHARS:,} characters at most")


Text = Annotated[str, Depends(_text)]
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The policy, as YAML or within JSON.",
        "content": {
            "application/json": {"schema": PolicyText.model_json_schema()},
            "application/yaml": {"schema": {"description": f"at most {MAX_CHARS:,} characters"}, "example": _EXAMPLE},
        },
    }
}


@router.post(
    "/policies/validate",
    response_model=Validity,
    responses=documented(400, 403, 413, 415, 422, 429, 503),
    openapi_extra=_BODY,
)
async def validate_policy(_admin: Admin, text: Text) -> dict[str, Any]:
    """Whether this is a policy, and if not, why, line by line."""
    found = await in_thread(_parsed, text)
    if isinstance(found, Policy):
        return {"valid": True, "sha256": found.sha256(), "faults": []}
    return {"valid": False, "sha256": None, "faults": found}


@router.post(
    "/tenants/{tenant}/policy/dry-run",
    response_model=DryRun,
    responses=documented(400, 403, 404, 413, 415, 422, 429, 503),
    openapi_extra=_BODY,
)
async def dry_run_policy(service: The, _admin: Admin, tenant: TenantName, text: Text) -> dict[str, Any]:
    """What this policy would change for the tenant, and whether it has spent more than that already."""
    row, new = await the_tenant(service, tenant), await in_thread(policy_of, text)
    platform = service.platform.policy
    after = platform.narrowed(new)
    at = datetime.now(UTC)
    purses = [
        (f"tenant-day:{tenant}:{at:%Y-%m-%d}", after.money.tenant_day),
        (f"tenant-month:{tenant}:{at:%Y-%m}", after.money.tenant_month),
    ]

    def spent(tx: Connection) -> list[Any]:
        return [_spending(*ledger.balance(tx, scope), limit) for scope, limit in purses]

    day, month = await anyio.to_thread.run_sync(service.platform.db.look, spent)
    return {
        "sha256": new.sha256(),
        "effective_sha256": after.sha256(),
        "changes": [
            {
                "key": found.key,
                "now": found.now,
                "then": found.then,
                "change": found.change,
                "beyond_platform": found.beyond,
            }
            for found in changes(platform, row.policy, new)
        ],
        "day": day,
        "month": month,
    }


@router.put(
    "/tenants/{tenant}/policy",
    response_model=TenantView,
    responses=documented(400, 403, 404, 413, 415, 422, 429, 503),
    openapi_extra=_BODY,
)
async def set_policy(service: The, admin: Admin, tenant: TenantName, text: Text) -> dict[str, Any]:
    """Put the policy in force, for queries that begin from now on: also those that were asked before, and wait."""
    await the_tenant(service, tenant)
    policy = await in_thread(policy_of, text)
    await in_thread(service.registry.set_policy, tenant, policy, by=by(admin))
    return view_of(service, await the_tenant(service, tenant))


@router.delete(
    "/tenants/{tenant}/policy", status_code=204, response_class=Response, responses=documented(403, 404, 422, 429, 503)
)
async def remove_policy(service: The, admin: Admin, tenant: TenantName) -> None:
    """From now on the tenant may do what the service may."""
    await the_tenant(service, tenant)
    await in_thread(service.registry.set_policy, tenant, None, by=by(admin))


def _parsed(text: str) -> Policy | list[Fault]:
    try:
        return parse_policy(text, "policy")
    except PolicyError as error:
        # A key of YAML can be any text: what is no text in UTF-8 is not passed on.
        found = _FAULT.findall(str(error).encode("utf-8", "replace").decode())[:MOST_FAULTS]
        return [Fault(line=int(line), what=what[:500]) for line, what in found]


def policy_of(text: str) -> Policy:
    """Raises Problem, with all faults."""
    found = _parsed(text)
    if isinstance(found, Policy):
        return found
    first = f"line {found[0].line}: {found[0].what}"
    raise Problem(422, "bad-policy", first, faults=[fault.model_dump(by_alias=True) for fault in found])


def _spending(spent: int, held: int, limit: int) -> dict[str, Any]:
    return {"spent_usd": usd(spent), "held_usd": usd(held), "limit_usd": usd(limit), "over": spent + held > limit}
