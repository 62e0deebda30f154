"""Tenants and API keys as the database has them: rows, and the texts in their columns."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from orchestrator.core.errors import RequestError
from orchestrator.core.issuers import Issuer
from orchestrator.core.policy import Policy
from orchestrator.store.db import now

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})")


@dataclass(frozen=True, slots=True)
class TenantRow:
    """policy: None for the platform's alone. issuer: whose tokens are taken for the tenant's. Times in RFC 3339."""

    name: str
    policy: Policy | None
    issuer: Issuer | None
    created_at: str
    suspended_at: str | None


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key without its secret. suspended: its tenant is. Times in RFC 3339, UTC."""

    id: str
    tenant: str
    label: str
    scopes: tuple[str, ...]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    used_at: str | None
    suspended: bool = False

    @property
    def status(self) -> Literal["live", "expired", "revoked"]:
        if self.revoked_at:
            return "revoked"
        return "expired" if self.expires_at and self.expires_at <= now() else "live"


def tenant_row(row: Any) -> TenantRow:
    policy = None if row.policy is None else Policy.model_validate_json(row.policy, strict=False)
    issuer = None if row.issuer is None else Issuer.model_validate_json(row.issuer)
    return TenantRow(row.name, policy, issuer, row.created_at, row.suspended_at)


def key_row(row: Any) -> KeyRow:
    fields = {name: getattr(row, name) for name in ("id", "tenant", "label", "created_at", "expires_at")}
    return KeyRow(**fields, scopes=tuple(json.loads(row.scopes)), revoked_at=row.revoked_at, used_at=row.used_at)


def issuer_text(issuer: Issuer) -> str:
    rest = issuer.model_dump(mode="json", exclude={"issuer"})
    return issuer_begins(issuer.issuer) + json.dumps(rest, ensure_ascii=True)[1:]


def issuer_begins(issuer: str) -> str:
    return f'{{"issuer": {json.dumps(issuer)}, '


def future(text: str | None) -> str | None:
    """As this database writes times. Raises RequestError."""
    if text is None:
        return None
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        at = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise RequestError(f"{text[:80]!r} is no time in RFC 3339, such as 2027-01-31T12:00:00Z") from None
    written = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if written <= now():
        raise RequestError(f"a key cannot expire in the past: {written}")
    return written
