"""`airlock tenants` and `airlock keys`: who may use the service."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from orchestrator import settings
from orchestrator.core.api_keys import EVERYDAY, SCOPES
from orchestrator.core.errors import RequestError
from orchestrator.named_policy import load_policy
from orchestrator.streams import say

if TYPE_CHECKING:
    from orchestrator.store.registered import KeyRow, TenantRow
    from orchestrator.store.registry import Registry

BY = "the command line"
_SPAN = re.compile(r"([1-9][0-9]{0,3})([hdw])", re.ASCII)
_HOURS = {"h": 1, "d": 24, "w": 7 * 24}
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def tenants() -> None:
    """Tenants of the service."""


@tenants.command(name="add")
@click.argument("name")
@click.option("--policy", metavar="POLICY", help="What it may do at most: a name or a file.")
@_as_json
def add(name: str, policy: str | None, as_json: bool) -> None:
    """Add the tenant NAME."""
    rules = load_policy(policy) if policy else None
    with _registry() as registry:
        row = registry.add_tenant(name, rules, by=BY)
    click.echo(f"tenant {name} is added: make it a key with `airlock keys create {name}`", err=True)
    if as_json:
        _print(_tenant(row))


@tenants.command(name="list")
@_as_json
def list_tenants(as_json: bool) -> None:
    """List the tenants: name, state, policy, live keys."""
    with _registry() as registry:
        rows = [_tenant(row, registry.keys(row.name)) for row in registry.tenants()]
    if as_json:
        _print({"tenants": rows})
        return
    for row in rows:
        policy = row["policy_sha256"] or "the policy of the service"
        if "policy" in row["damaged"]:
            policy = "its policy is damaged: set it anew"
        say(sys.stdout, f"{row['name']}\t{row['state']}\t{policy}\t{row['live_keys']} live keys")


def _tenant(row: TenantRow, keys_of: Sequence[KeyRow] = ()) -> dict[str, Any]:
    policy = None if "policy" in row.damaged else row.policy
    return {
        "name": row.name,
        "state": "suspended" if row.suspended_at else "active",
        "policy_sha256": policy.sha256() if policy else None,
        "damaged": list(row.damaged),
        "created_at": row.created_at,
        "live_keys": sum(key.status == "live" for key in keys_of),
    }


@tenants.command(name="suspend")
@click.argument("name")
def suspend(name: str) -> None:
    """Take no key or token of the tenant NAME from now on."""
    with _registry() as registry:
        registry.suspend(name, by=BY)


@tenants.command(name="restore")
@click.argument("name")
def restore(name: str) -> None:
    """Undo `suspend`."""
    with _registry() as registry:
        registry.restore(name, by=BY)


@click.group()
def keys() -> None:
    """API keys of tenants."""


@keys.command(name="create")
@click.argument("tenant")
@click.option("--label", default="default", show_default=True, help="What it is for. Of one label, two keys can live.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(list(SCOPES)),
    help=f"What it may do; may be repeated. admin: administer all tenants. Default: {', '.join(EVERYDAY)}.",
)
@click.option("--expires", metavar="WHEN", help="After 12h, 90d, 4w, or at a time such as 2027-01-31T12:00:00Z.")
@_as_json
def create(tenant: str, label: str, scopes: tuple[str, ...], expires: str | None, as_json: bool) -> None:
    """Make a key for TENANT and print it, once: it cannot be had again."""
    with _registry() as registry:
        row, text = registry.create_key(
            tenant, label=label, scopes=scopes or EVERYDAY, expires_at=_time(expires), by=BY
        )
    if as_json:
        _print({"key": text, "id": row.id, "scopes": row.scopes, "expires_at": row.expires_at})
    else:
        until = f", until {row.expires_at}" if row.expires_at else ""
        what = f"key {row.id} of tenant {tenant} ({', '.join(row.scopes)}{until})"
        click.echo(f"{what}; keep it, for it is not shown again:", err=True)
        say(sys.stdout, text)


@keys.command(name="list")
@click.argument("tenant")
@_as_json
def list_keys(tenant: str, as_json: bool) -> None:
    """List the keys of TENANT: id, status, label, scopes, expiry, last use."""
    with _registry() as registry:
        if registry.tenant(tenant) is None:
            raise RequestError(f"there is no tenant {tenant[:80]!r}: `airlock tenants list` lists them")
        rows = registry.keys(tenant)
    if as_json:
        names = ("id", "status", "label", "scopes", "created_at", "expires_at", "revoked_at", "used_at")
        _print({"keys": [{name: getattr(row, name) for name in names} for row in rows]})
        return
    for row in rows:
        expiry, used = row.expires_at or "no expiry", row.used_at or "never used"
        say(sys.stdout, "\t".join((row.id, row.status, row.label, ",".join(row.scopes), expiry, used)))


@keys.command(name="revoke")
@click.argument("tenant")
@click.argument("key")
def revoke(tenant: str, key: str) -> None:
    """Revoke a KEY of TENANT, by its id: from now on nobody is let in with it."""
    with _registry() as registry:
        registry.revoke_key(tenant, key, by=BY)


@contextmanager
def _registry() -> Generator[Registry]:
    """Of this data folder, which is made if need be. Raises RequestError, StoreError."""
    from orchestrator.data_folder import open_database, open_keys
    from orchestrator.store.registry import Registry
    from orchestrator.store.signing import Notary

    home = settings.home()
    db = open_database(home)
    try:
        vault = open_keys(db, home)
        yield Registry(db, vault, Notary(vault.signer(), home / "heads", vault.stamp))
    finally:
        db.close()


def _time(text: str | None) -> str | None:
    """A span of time from now on as RFC 3339; what is none is left as it is."""
    found = _SPAN.fullmatch(text) if text else None
    if found is None:
        return text
    return (datetime.now(UTC) + timedelta(hours=int(found[1]) * _HOURS[found[2]])).isoformat()


def _print(row: dict[str, Any]) -> None:
    say(sys.stdout, json.dumps(row))
