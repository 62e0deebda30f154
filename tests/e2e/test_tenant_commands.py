"""`airlock tenants` and `airlock keys`: what they print, and that all of it is on record."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.core.api_keys import parse_key
from orchestrator.named_policy import load_policy
from tests.command import Airlock


def actions(airlock: Airlock, tenant: str) -> list[tuple[str, str]]:
    bodies = [record["body"] for record in airlock.records(f"tenants/{tenant}")]
    assert {body["by"] for body in bodies} == {"the command line"}
    return [(body["action"], body["subject"]) for body in bodies]


def test_a_tenant_and_its_key(airlock: Airlock) -> None:
    done = airlock("tenants", "add", "acme", code=0)
    assert (done.out, done.lines) == ("", ["tenant acme is added: make it a key with `airlock keys create acme`"])
    made = airlock("keys", "create", "acme", code=0)
    key = parse_key(made.out.removesuffix("\n"))
    assert key
    assert made.lines == [f"key {key.id} of tenant acme (query, read, audit); keep it, for it is not shown again:"]
    (row,) = airlock("keys", "list", "acme", "--json", code=0).json["keys"]
    assert (row["id"], row["status"], row["label"], row["used_at"]) == (key.id, "live", "default", None)
    shown = airlock("keys", "list", "acme", code=0).out
    assert shown == f"{key.id}\tlive\tdefault\tquery,read,audit\tno expiry\tnever used\n"
    assert key.secret not in shown + json.dumps(row)
    assert airlock("tenants", "list", code=0).out == "acme\tactive\tthe policy of the service\t1 live keys\n"
    assert airlock("keys", "revoke", "acme", key.id, code=0).out == ""
    assert airlock("keys", "list", "acme", "--json", code=0).json["keys"][0]["status"] == "revoked"
    assert actions(airlock, "acme") == [("tenant.added", "acme"), ("key.created", key.id), ("key.revoked", key.id)]
    assert "holds" in airlock("audit", "verify", code=0).out


def test_a_key_with_everything_said(airlock: Airlock) -> None:
    airlock("tenants", "add", "acme", code=0)
    options = ["--label", "ci", "--scope", "admin", "--scope", "read", "--expires", "90d", "--json"]
    said = airlock("keys", "create", "acme", *options, code=0).json
    key = parse_key(said["key"])
    assert key
    assert (said["id"], said["scopes"]) == (key.id, ["read", "admin"])
    lasts = datetime.fromisoformat(said["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=89, hours=23) < lasts <= timedelta(days=90)
    at = airlock("keys", "create", "acme", "--expires", "2900-01-31T12:00:00+01:00", "--json", code=0).json
    assert at["expires_at"] == "2900-01-31T11:00:00.000Z"


def test_a_tenant_with_a_policy(airlock: Airlock) -> None:
    path = airlock.policy("strict", money_query="0.1 USD")
    added = airlock("tenants", "add", "acme", "--policy", path, "--json", code=0).json
    assert added["policy_sha256"] == load_policy(str(path)).sha256()
    (listed,) = airlock("tenants", "list", "--json", code=0).json["tenants"]
    assert listed == added
    airlock("tenants", "suspend", "acme", code=0)
    assert airlock("tenants", "list", "--json", code=0).json["tenants"][0]["state"] == "suspended"
    airlock("tenants", "restore", "acme", code=0)
    assert airlock("tenants", "list", "--json", code=0).json["tenants"] == [added]
    kinds = [action for action, _ in actions(airlock, "acme")]
    assert kinds == ["tenant.added", "tenant.suspended", "tenant.restored"]


def test_a_damaged_policy_is_one_tenants_affair(airlock: Airlock) -> None:
    for name in ("acme", "other"):
        airlock("tenants", "add", name, code=0)
    with closing(sqlite3.connect(airlock.home / "airlock.db")) as db, db:
        db.execute("UPDATE tenants SET policy = '{' WHERE name = 'acme'")
    rows = airlock("tenants", "list", "--json", code=0).json["tenants"]
    assert [(row["name"], row["damaged"]) for row in rows] == [("acme", ["policy"]), ("other", [])]
    first, second = airlock("tenants", "list", code=0).out.splitlines()
    assert "its policy is damaged" in first
    assert "the policy of the service" in second


def test_the_tenant_of_the_command_line(airlock: Airlock) -> None:
    """Its own queries are those of `default`, which may be added like any other, before they are or after."""
    script = airlock.file("script.yaml", "root: ['FINAL(yes)']\n")
    options = ("--context", "context.txt", "--model", f"scripted:{script}")
    airlock("run", "is it?", *options, code=0)
    airlock("tenants", "add", "default", code=0)
    airlock("keys", "create", "default", code=0)
    airlock("run", "is it?", *options, code=0)
    assert len(actions(airlock, "default")) == 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("keys create nobody", "there is no tenant 'nobody': add it first, with `airlock tenants add NAME`"),
        ("keys list nobody", "there is no tenant 'nobody': `airlock tenants list` lists them"),
        ("keys revoke nobody abcdefgh2345", "there is no tenant 'nobody'"),
        ("keys revoke acme abcdefgh2345", "tenant acme has no key 'abcdefgh2345': `airlock keys list acme` lists them"),
        ("keys create acme --scope root", "'root' is not one of"),
        ("keys create acme --expires soon", "'soon' is no time in RFC 3339"),
        ("keys create acme --expires 0d", "'0d' is no time in RFC 3339"),
        ("keys create acme --expires 2001-01-01T00:00:00Z", "a key cannot expire in the past"),
        ("tenants add acme", "there is a tenant 'acme' already"),
        ("tenants add a/b", "'a/b' is no name for a tenant"),
        ("tenants add more --policy nothing.yaml", "cannot read policy 'nothing.yaml'"),
        ("tenants suspend nobody", "there is no tenant 'nobody'"),
    ],
)
def test_what_cannot_be_done(airlock: Airlock, command: str, said: str) -> None:
    airlock("tenants", "add", "acme", code=0)
    assert said in airlock(*command.split(), code=2).said
    assert actions(airlock, "acme") == [("tenant.added", "acme")]


def test_a_third_key_of_one_label(airlock: Airlock) -> None:
    airlock("tenants", "add", "acme", code=0)
    ids = [airlock("keys", "create", "acme", "--json", code=0).json["id"] for _ in range(2)]
    said = airlock("keys", "create", "acme", code=2).said
    assert said == (
        f"label 'default' of tenant acme has 2 live keys ({', '.join(ids)}): revoke one of them, or take another label"
    )
    airlock("keys", "revoke", "acme", ids[0], code=0)
    airlock("keys", "create", "acme", code=0)
