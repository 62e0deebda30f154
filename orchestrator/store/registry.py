"""Tenants and their API keys.

Of a key only an HMAC is kept, under a pepper that is made of the master key, over the secret and everything that the
key may do: whoever can write to the database, and has not the master key, can neither make a key nor widen one. Every
change is on record in the tenant's own chain, which is signed in the same transaction.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa

from orchestrator.core.api_keys import EVERYDAY, RANDOM_BYTES, ApiKey, in_order, is_key_id, make_key, parse_key
from orchestrator.core.errors import Conflict, RequestError
from orchestrator.core.events import Event
from orchestrator.core.issuers import MOST_WORD, Issuer
from orchestrator.core.policy import Policy
from orchestrator.core.tenants import is_tenant
from orchestrator.store import journal
from orchestrator.store.db import Database, now
from orchestrator.store.prepared import Prepared
from orchestrator.store.registered import KeyRow, TenantRow, future, issuer_begins, issuer_text, key_row, tenant_row
from orchestrator.store.schema import api_keys, tenants
from orchestrator.store.signing import Notary
from orchestrator.store.vault import Vault

LABEL = "default"
MOST_LIVE = 2  # keys with one label: the old one and the new one, while they are exchanged
TOUCH_S = 60.0  # between two notes that a key was used
_MOST_LABEL = 64

_find_key = Prepared(
    sa.select(
        *(api_keys.c[name] for name in ("id", "tenant", "label", "scopes", "created_at", "expires_at", "revoked_at")),
        *(api_keys.c.used_at, tenants.c.suspended_at, api_keys.c.mac),
    )
    .join(tenants, tenants.c.name == api_keys.c.tenant)
    .where(api_keys.c.id == sa.bindparam("of"))
)


# What a key that is not there is compared with: a row like any other, so that it takes as long.
_NOBODY: tuple[Any, ...] = ("", "", "", json.dumps(EVERYDAY), "", None, None, None, None, bytes(32))


class Registry:
    """Blocks. Whatever reads or writes raises StoreError; what cannot be done as asked raises RequestError.

    by: who makes a change, for the record: `the command line`, `key ID`.
    """

    def __init__(self, db: Database, vault: Vault, notary: Notary) -> None:
        self._db = db
        self._notary = notary
        self._pepper = vault.derived("api keys")
        self._touched: dict[str, float] = {}  # id of a key -> when it was last noted that it was used

    # Tenants

    def add_tenant(self, name: str, policy: Policy | None = None, *, by: str) -> TenantRow:
        if not is_tenant(name):
            rule = "1 to 64 letters, digits, `.`, `_` and `-`, the first of them a letter or a digit"
            raise RequestError(f"{name[:80]!r} is no name for a tenant: take {rule}")
        row = {"name": name, "policy": _written(policy), "issuer": None, "created_at": now(), "suspended_at": None}

        def work(tx: sa.Connection) -> None:
            if tx.execute(sa.select(tenants.c.name).where(tenants.c.name == name)).scalar() is not None:
                raise Conflict(f"there is a tenant {name!r} already")
            tx.execute(sa.insert(tenants).values(**row))

        self._change(name, work, "tenant.added", name, _told(policy), by)
        return TenantRow(name, str(row["created_at"]), None, policy)

    def tenant(self, name: str) -> TenantRow | None:
        find = sa.select(tenants).where(tenants.c.name == name)
        found = self._db.look(lambda tx: tx.execute(find).one_or_none()) if is_tenant(name) else None
        return tenant_row(found) if found else None

    def tenants(self, after: str = "", most: int | None = None) -> list[TenantRow]:
        """By name, those that come after `after`, `most` of them."""
        rows = self._db.look(lambda tx: tx.execute(sa.select(tenants)).all())
        # Names are compared byte by byte, here and not in the database: not every collation does.
        wanted = sorted((row for row in rows if row.name > after), key=lambda row: row.name)
        return [tenant_row(row) for row in wanted[:most]]

    def set_policy(self, name: str, policy: Policy | None, *, by: str) -> None:
        """None: the platform's alone."""
        action = "policy.set" if policy else "policy.removed"
        self._alter(name, {"policy": _written(policy)}, action, _told(policy), by)

    def suspend(self, name: str, *, by: str) -> None:
        """None of its keys and tokens is taken from now on, and what it has running is cancelled."""
        self._alter(name, {"suspended_at": now()}, "tenant.suspended", "", by, tenants.c.suspended_at.is_(None))

    def restore(self, name: str, *, by: str) -> None:
        self._alter(name, {"suspended_at": None}, "tenant.restored", "", by, tenants.c.suspended_at.is_not(None))

    def suspended(self) -> set[str]:
        """The names of tenants that are."""
        find = sa.select(tenants.c.name).where(tenants.c.suspended_at.is_not(None))
        return set(self._db.look(lambda tx: tx.execute(find).scalars().all()))

    def set_issuer(self, name: str, issuer: Issuer | None, *, by: str) -> None:
        """Raises Conflict where another tenant has this issuer and audience."""
        detail = f"{issuer.issuer} for {issuer.audience}, {issuer.algorithm}" if issuer else ""
        values = {"issuer": issuer_text(issuer) if issuer else None}

        def free(tx: sa.Connection) -> None:
            taken = _issued(tx, issuer.issuer) if issuer else []
            if any(row.name != name and issuer and other.audience == issuer.audience for row, other in taken):
                # Whose, is no affair of this one's.
                raise Conflict("this issuer and audience are another tenant's: take an audience of the tenant's own")

        self._alter(name, values, "issuer.set" if issuer else "issuer.removed", detail, by, before=free)

    def issuers(self, issuer: str) -> list[tuple[TenantRow, Issuer]]:
        """The tenants that take tokens of this issuer, with what they take."""
        could_be = len(issuer) <= MOST_WORD and issuer.isprintable()
        return self._db.look(lambda tx: _issued(tx, issuer)) if could_be else []

    # Keys

    def create_key(
        self,
        tenant: str,
        *,
        label: str = LABEL,
        scopes: Iterable[str] = EVERYDAY,
        expires_at: str | None = None,
        by: str,
    ) -> tuple[KeyRow, str]:
        """The key, and its text, which is not to be had again. expires_at: RFC 3339.

        Raises Conflict where the label has two live keys.
        """
        if not (0 < len(label) <= _MOST_LABEL and label.isprintable()):
            raise RequestError(f"a key's label has 1 to {_MOST_LABEL} printable characters, not {label[:80]!r}")
        try:
            permitted = in_order(scopes)
        except ValueError as error:
            raise RequestError(str(error)) from None
        key = make_key(secrets.token_bytes(RANDOM_BYTES))
        row = KeyRow(key.id, tenant, label, permitted, now(), future(expires_at), None, None)

        def work(tx: sa.Connection) -> None:
            _require_tenant(tx, tenant)
            same = tx.execute(sa.select(api_keys).where(api_keys.c.tenant == tenant, api_keys.c.label == label))
            live = [found.id for found in map(key_row, same) if found.status == "live"]
            if len(live) >= MOST_LIVE:
                raise Conflict(
                    f"label {label!r} of tenant {tenant} has {MOST_LIVE} live keys ({', '.join(live)}): "
                    "revoke one of them, or take another label"
                )
            values = {name: getattr(row, name) for name in ("id", "tenant", "label", "created_at", "expires_at")}
            tx.execute(sa.insert(api_keys).values(**values, scopes=json.dumps(permitted), mac=self._mac(key, row)))

        detail = f"{label}: {', '.join(permitted)}; " + (f"until {row.expires_at}" if row.expires_at else "no expiry")
        self._change(tenant, work, "key.created", key.id, detail, by)
        return row, key.text

    def keys(self, tenant: str) -> list[KeyRow]:
        """All that there ever were, the oldest first."""
        find = sa.select(api_keys).where(api_keys.c.tenant == tenant).order_by(api_keys.c.created_at, api_keys.c.id)
        if not is_tenant(tenant):
            return []
        return list(map(key_row, self._db.look(lambda tx: tx.execute(find).all())))

    def revoke_key(self, tenant: str, name: str, *, by: str) -> None:
        """At once, and with it the sessions that it began. name: its id. Idempotent."""
        mine = (api_keys.c.id == name, api_keys.c.tenant == tenant)

        def work(tx: sa.Connection) -> bool:
            _require_tenant(tx, tenant)
            find = sa.select(api_keys.c.revoked_at).where(*mine)
            found = tx.execute(find).one_or_none() if is_key_id(name) else None
            if found is None:
                raise RequestError(f"tenant {tenant} has no key {name[:80]!r}: `airlock keys list {tenant}` lists them")
            if found.revoked_at is None:
                tx.execute(sa.update(api_keys).where(*mine).values(revoked_at=now()))
            return found.revoked_at is None

        self._change(tenant, work, "key.revoked", name, "", by)

    def check_key(self, text: str) -> KeyRow | None:
        """The live key that this is the text of. An id that is not there costs what a wrong secret does."""
        key = parse_key(text)
        if key is None:
            return None
        row, mac = self._found(key.id)
        same = hmac.compare_digest(self._mac(key, row), mac)
        return row if same and row.id and row.status == "live" else None

    def live_key(self, name: str) -> KeyRow | None:
        """By its id, for a session that it began."""
        row = self._found(name)[0] if is_key_id(name) else None
        return row if row and row.id and row.status == "live" else None

    def touch(self, name: str) -> None:
        """Note that a key is used: once a minute, and committed with what comes next. Does not block."""
        at = time.monotonic()
        if at - self._touched.get(name, -TOUCH_S) >= TOUCH_S:
            self._touched[name] = at
            used = sa.update(api_keys).where(api_keys.c.id == name).values(used_at=now())
            self._db.post(lambda tx: tx.execute(used))

    def _found(self, name: str) -> tuple[KeyRow, bytes]:
        """The key, without an id where there is none, and what its secret is compared with."""
        rows = self._db.look(lambda tx: _find_key(tx, {"of": name}))
        fields: list[Any]
        *fields, suspended_at, mac = rows[0] if rows else _NOBODY
        fields[3] = tuple(json.loads(fields[3]))
        return KeyRow(*fields, suspended=suspended_at is not None), bytes(mac)

    def _mac(self, key: ApiKey, row: KeyRow) -> bytes:
        said = [key.id, key.secret, row.tenant, *row.scopes, row.expires_at or ""]
        return hmac.digest(self._pepper, json.dumps(said).encode(), "sha256")

    # Changes

    def _alter(
        self,
        name: str,
        values: dict[str, Any],
        action: str,
        detail: str,
        by: str,
        *still: sa.ColumnElement[bool],
        before: Callable[[sa.Connection], None] = lambda _tx: None,
    ) -> None:
        """Change the tenant's row where `still` holds; where it does not, it has been changed so before."""

        def work(tx: sa.Connection) -> bool:
            _require_tenant(tx, name)
            before(tx)
            return tx.execute(sa.update(tenants).where(tenants.c.name == name, *still).values(**values)).rowcount > 0

        self._change(name, work, action, name, detail, by)

    def _change(
        self, tenant: str, work: Callable[[sa.Connection], bool | None], action: str, subject: str, detail: str, by: str
    ) -> None:
        """Do it, put it on record and sign that, all or nothing. work: False where nothing was to be changed."""
        event = Event("admin.action", "root", {"action": action, "subject": subject, "detail": detail, "by": by[:200]})

        def whole(tx: sa.Connection) -> Any:
            if work(tx) is False:
                return None
            journal.append(tx, journal.own_chain(tenant), event)
            return self._notary.sign(tx, tenant)

        if signed := self._db.write_sync(whole):
            self._notary.remember(signed)


def _require_tenant(tx: sa.Connection, name: str) -> None:
    find = sa.select(tenants.c.name).where(tenants.c.name == name)
    if not is_tenant(name) or tx.execute(find).scalar() is None:
        raise RequestError(f"there is no tenant {name[:80]!r}: add it first, with `airlock tenants add NAME`")


def _issued(tx: sa.Connection, issuer: str) -> list[tuple[TenantRow, Issuer]]:
    """The text of an issuer begins with who it is; LIKE takes a for A, so that is looked at again."""
    begins = issuer_begins(issuer)
    rows = tx.execute(sa.select(tenants).where(tenants.c.issuer.startswith(begins, autoescape=True)))
    found = map(tenant_row, rows)
    sound = [(row, row.issuer) for row in found if "issuer" not in row.damaged]
    return [(row, taken) for row, taken in sound if taken and taken.issuer == issuer]


def _written(policy: Policy | None) -> str | None:
    return None if policy is None else policy.model_dump_json()


def _told(policy: Policy | None) -> str:
    return f"policy {policy.sha256()}" if policy else "the platform's policy"
