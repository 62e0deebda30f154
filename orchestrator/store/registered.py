"""Tenants and API keys as the database has them: rows, and the texts in their columns."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from orchestrator.core.errors import RequestError, StoreError
from orchestrator.core.issuers import Issuer
from orchestrator.core.policy import Policy
from orchestrator.store.db import now

M = TypeVar("M", bound=BaseModel)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})")


Part = Literal["policy", "issuer"]


@dataclass(frozen=True, slots=True)
class TenantRow:
    """damaged: what of it cannot be read. No tenant may do more because of that. Times in RFC 3339."""

    name: str
    created_at: str
    suspended_at: str | None
    _policy: Policy | None = None
    _issuer: Issuer | None = None
    damaged: tuple[Part, ...] = ()

    @property
    def policy(self) -> Policy | None:
        """None for the platform's alone. Raises StoreError where it is damaged."""
        self._require("policy")
        return self._policy

    @property
    def issuer(self) -> Issuer | None:
        """Whose tokens are taken for the tenant's. Raises StoreError where that is damaged."""
        self._require("issuer")
        return self._issuer

    def _require(self, part: Part) -> None:
        if part in self.damaged:
            raise StoreError(f"the {part} of tenant {self.name} is damaged in the database: set or remove it anew")


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
    """Raises nothing: what is wrong with one tenant is no affair of the others."""
    damaged: list[Part] = []
    policy = _read(Policy, row, "policy", damaged)
    issuer = _read(Issuer, row, "issuer", damaged)
    return TenantRow(row.name, row.created_at, row.suspended_at, policy, issuer, tuple(damaged))


def _read(kind: type[M], row: Any, part: Part, damaged: list[Part]) -> M | None:
    try:
        text = getattr(row, part)
        return None if text is None else kind.model_validate_json(text, strict=False)
    except (ValueError, TypeError, RecursionError):
        damaged.append(part)
        return None


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
