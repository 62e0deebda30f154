"""The admin's routes: what they do, what they refuse, and that no bad input is a fault of the service."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.api_keys import parse_key
from orchestrator.core.errors import StoreError
from orchestrator.core.policy_file import parse_policy
from orchestrator.server.desk import Ask, Desk
from orchestrator.server.paging import make_cursor
from orchestrator.server.problems import ProblemBody
from orchestrator.server.service import Principal
from orchestrator.server.under_way import UnderWay
from orchestrator.store import journal, ledger
from orchestrator.store.schema import tenants
from orchestrator.store.scope import Scope
from tests.unit.helpers import DEFAULT, POLICIES, quick
from tests.unit.serving import Small, small
from tests.unit.test_access import problem
from tests.unit.test_tokens import claims, issuer, jwk, signed

STRICT = (POLICIES / "strict.yaml").read_text()
YAML, JSON = {"Content-Type": "application/yaml"}, {"Content-Type": "application/json"}


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Small]:
    with small(tmp_path, requests_minute=10_000) as made:
        made.client.headers.update(made.bearer("admin", tenant="ops"))
        yield made


def admin_key(there: Small) -> str:
    return there.registry.keys("ops")[0].id


def add(there: Small, name: str = "acme", **more: Any) -> dict[str, Any]:
    answer = there.client.post("/v1/admin/tenants", json={"name": name, **more})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/admin/tenants/{name}"
    return answer.json()


def actions(there: Small, tenant: str = "acme") -> list[tuple[str, str]]:
    chain = there.service.platform.db.read(lambda tx: journal.chain(tx, journal.own_chain(tenant).id))
    bodies = [json.loads(record)["body"] for record, _ in chain]
    return [(body["action"], body["by"]) for body in bodies]


# Tenants


def test_a_tenants_life(there: Small):
    made = add(there)
    assert made == {
        "name": "acme",
        "state": "active",
        "created_at": made["created_at"],
        "suspended_at": None,
        "policy_sha256": None,
        "damaged": [],
        "policy": None,
        "policy_yaml": None,
        "effective_policy_sha256": DEFAULT.sha256(),
        "issuer": None,
    }
    assert there.client.get("/v1/admin/tenants/acme").json() == made
    problem(there.client.post("/v1/admin/tenants", json={"name": "acme"}), 409, "conflict")
    for _twice in range(2):
        suspended = there.client.post("/v1/admin/tenants/acme/suspend").json()
        assert suspended["state"] == "suspended"
        assert suspended["suspended_at"]
    assert there.client.post("/v1/admin/tenants/acme/restore").json() == made
    by = f"key {admin_key(there)}"
    assert actions(there) == [("tenant.added", by), ("tenant.suspended", by), ("tenant.restored", by)]


def test_tenants_are_listed_in_pages(there: Small):
    for name in ("b", "a", "C"):
        add(there, name)
    seen = [row["name"] for row in paged(there, "/v1/admin/tenants", "tenants")]
    assert seen == ["C", "a", "b", "ops"]
    assert there.client.get("/v1/admin/tenants").json()["next"] is None


def paged(there: Small, path: str, rows: str) -> list[dict[str, Any]]:
    """All rows of a list, two by two."""
    seen, asked = list[dict[str, Any]](), dict[str, Any](limit=2)
    while True:
        page = there.client.get(path, params=asked).json()
        assert page.keys() == {rows, "next"}
        assert 0 < len(page[rows]) <= 2
        seen += page[rows]
        if page["next"] is None:
            return seen
        asked["cursor"] = page["next"]


def test_keys_are_listed_in_pages(there: Small):
    add(there)
    made = [there.client.post("/v1/admin/tenants/acme/keys", json={"label": f"number {n}"}).json() for n in range(5)]
    seen = paged(there, "/v1/admin/tenants/acme/keys", "keys")
    assert sorted(row["id"] for row in seen) == sorted(key["id"] for key in made)
    assert seen == there.client.get("/v1/admin/tenants/acme/keys").json()["keys"]
    assert seen == sorted(seen, key=lambda row: (row["created_at"], row["id"]))


@pytest.mark.parametrize("path", ["/v1/queries", "/v1/contexts", "/v1/admin/tenants", "/v1/admin/tenants/ops/keys"])
def test_what_is_no_cursor_of_a_list_is_told_alike(there: Small, path: str):
    name = path.rpartition("/")[2]
    own = make_cursor(name, "2026-01-01T00:00:00.000Z", "a")
    there.client.headers.update(there.bearer("admin", "read", tenant="ops"))
    assert there.client.get(path, params={"cursor": own}).status_code == 200
    other = make_cursor("others", "2026-01-01T00:00:00.000Z", "a")
    raw = (b"\xff", b"a", f"{name} a".encode(), f"{name} a b c".encode(), f"{name} \0 a".encode())
    made = [base64.urlsafe_b64encode(each).decode().rstrip("=") for each in raw]
    for cursor in ("", " ", "x", "\0", "é", "a" * 401, own + "=", own + "AAAA", other, *made):
        told = problem(there.client.get(path, params={"cursor": cursor}), 422, "bad-request")
        assert told["detail"] == "this is no cursor: take `next` of the page before", cursor
    for limit in (0, 201, "x"):
        problem(there.client.get(path, params={"limit": limit}), 422, "bad-request")


def test_a_tenant_with_a_policy(there: Small):
    made = add(there, policy=STRICT)
    assert made["policy"]["sandbox"]["least_isolation"] == "gvisor"
    answer = there.client.post("/v1/admin/tenants", json={"name": "other", "policy": "models: 1"})
    assert problem(answer, 422, "bad-policy")["faults"]
    assert there.client.get("/v1/admin/tenants/other").status_code == 404


def test_a_tenant_whose_policy_is_damaged(there: Small):
    add(there, policy=STRICT)
    add(there, "other")
    damage = sa.update(tenants).where(tenants.c.name == "acme").values(policy="{")
    there.service.platform.db.write_sync(lambda tx: tx.execute(damage))
    listed = there.client.get("/v1/admin/tenants").json()["tenants"]
    assert [(row["name"], row["damaged"]) for row in listed] == [("acme", ["policy"]), ("ops", []), ("other", [])]
    shown = there.client.get("/v1/admin/tenants/acme").json()
    assert (shown["policy"], shown["policy_sha256"], shown["effective_policy_sha256"]) == (None, None, None)
    run = there.client.portal
    assert run
    service = there.service
    quiet = lambda *_said: None  # noqa: E731
    service.under_way = run.call(UnderWay, service.platform, there.registry, 1, 0.0, quiet, quiet)
    desk = service.desk = Desk(service.platform, service.settings, service.under_way)
    mine = there.bearer("read", "query")
    for path, kind in (("/v1/budgets", "store-unavailable"), ("/v1/models", "store_unavailable")):
        answer = there.client.get(path, headers=mine)
        assert (answer.status_code, kind in answer.text) == (503, True), answer.text
    nothing: Any = None
    with pytest.raises(StoreError, match="the policy of tenant acme is damaged"):
        run.call(desk.ask, Principal("acme", frozenset(), "x", "key"), Ask("q", nothing))
    assert there.client.post("/v1/admin/tenants/acme/suspend").json()["state"] == "suspended"
    there.client.post("/v1/admin/tenants/acme/restore")
    put = there.client.put("/v1/admin/tenants/acme/policy", content=STRICT, headers=YAML)
    assert put.json()["damaged"] == []
    assert run.call(desk.policy_of, "acme") == DEFAULT.narrowed(parse_policy(STRICT, "policy"))


# Keys


def test_a_key_is_shown_once(there: Small):
    add(there)
    asked = {"label": "ci", "scopes": ["read", "query"], "expires_at": "2900-01-01T00:00:00Z"}
    answer = there.client.post("/v1/admin/tenants/acme/keys", json=asked)
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    made = answer.json()
    key = parse_key(made.pop("key"))
    assert key
    assert (made["id"], made["label"], made["scopes"]) == (key.id, "ci", ["query", "read"])
    listed = there.client.get("/v1/admin/tenants/acme/keys")
    assert listed.json() == {"keys": [made], "next": None}
    assert key.secret not in listed.text
    assert there.client.get("/v1/session", headers={"Authorization": f"Bearer {key.text}"}).json()["tenant"] == "acme"
    assert there.client.delete(f"/v1/admin/tenants/acme/keys/{key.id}").status_code == 204
    assert there.client.delete(f"/v1/admin/tenants/acme/keys/{key.id}").status_code == 204
    problem(there.client.get("/v1/session", headers={"Authorization": f"Bearer {key.text}"}), 401, "unauthorized")
    assert there.client.get("/v1/admin/tenants/acme/keys").json()["keys"][0]["status"] == "revoked"


def test_a_key_without_a_word(there: Small):
    add(there)
    made = there.client.post("/v1/admin/tenants/acme/keys", json={}).json()
    assert (made["label"], made["scopes"], made["expires_at"]) == ("default", ["query", "read", "audit"], None)
    assert there.client.post("/v1/admin/tenants/acme/keys", json={}).status_code == 201
    third = problem(there.client.post("/v1/admin/tenants/acme/keys", json={}), 409, "conflict")
    assert "revoke one of them" in third["detail"]


def test_a_key_is_revoked_as_its_own_tenants(there: Small):
    add(there)
    add(there, "other")
    made = there.client.post("/v1/admin/tenants/acme/keys", json={}).json()
    for path in ("other/keys/" + made["id"], "acme/keys/" + "a" * 12, "nobody/keys/" + made["id"]):
        problem(there.client.delete(f"/v1/admin/tenants/{path}"), 404, "not-found")
    assert there.client.get("/v1/admin/tenants/acme/keys").json()["keys"][0]["status"] == "live"


# Issuers


def test_an_issuer_lets_in(there: Small):
    add(there)
    said = {"issuer": "https://login.example", "audience": "airlock", "algorithm": "RS256", "jwks": {"keys": [jwk()]}}
    answer = there.client.put("/v1/admin/tenants/acme/issuer", json=said)
    assert answer.json()["issuer"] == json.loads(issuer().model_dump_json())
    token = {"Authorization": f"Bearer {signed()}"}
    assert there.client.get("/v1/admin/tenants", headers=token).status_code == 403, "it is known, and no admin"
    add(there, "other")
    taken = problem(there.client.put("/v1/admin/tenants/other/issuer", json=said), 409, "conflict")
    assert "acme" not in taken["detail"]
    admins = {**said, "scopes": ["admin"]}
    assert there.client.put("/v1/admin/tenants/acme/issuer", json=admins).status_code == 200
    token = {"Authorization": f"Bearer {signed(claims(scope='admin'))}"}
    assert there.client.post("/v1/admin/tenants/other/suspend", headers=token).status_code == 200
    assert actions(there, "other")[-1] == ("tenant.suspended", "token ann")
    assert there.client.delete("/v1/admin/tenants/acme/issuer").status_code == 204
    problem(there.client.get("/v1/admin/tenants", headers=token), 401, "unauthorized")


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "HS256"},
        {"algorithm": "none"},
        {"jwks": {"keys": [{"kty": "oct", "k": "AAAA"}]}},
        {"jwks": {"keys": [{**jwk(), "d": "AAAA"}]}},
        {"jwks": {"keys": [jwk("ES256")]}},
        {"jwks": {"keys": [{"kty": "RSA", "n": 10**400, "e": [[]]}]}},
        {"jwks": None, "jwks_uri": "http://login.example/keys"},
        {"jwks_uri": "https://login.example/keys"},
        {"issuer": "a\ud800"},
        {"audience": "\0"},
        {"scopes": ["root"]},
    ],
)
def test_issuers_that_are_not_taken(there: Small, change: dict[str, Any]):
    add(there)
    said = {**json.loads(issuer().model_dump_json()), **change}
    answer = there.client.put("/v1/admin/tenants/acme/issuer", content=json.dumps(said), headers=JSON)
    problem(answer, 422, "bad-request")
    assert there.client.get("/v1/admin/tenants/acme").json()["issuer"] is None


def test_what_else_is_in_a_key_is_not_kept(there: Small):
    add(there)
    odd = {**jwk(), "x5c": ["\ud800"], "more": float("nan"), "use": ["sig"]}
    said = json.dumps({**json.loads(issuer().model_dump_json()), "jwks": {"keys": [odd]}})
    assert there.client.put("/v1/admin/tenants/acme/issuer", content=said, headers=JSON).status_code == 200
    kept = there.client.get("/v1/admin/tenants/acme").json()["issuer"]["jwks"]["keys"]
    assert kept == [{name: value for name, value in jwk().items() if name in ("kty", "kid", "n", "e")}]


# Policies


def test_a_policy_is_checked(there: Small):
    for sent in ({"content": STRICT, "headers": YAML}, {"json": {"yaml": STRICT}}):
        said = there.client.post("/v1/admin/policies/validate", **sent).json()
        assert said["valid"], said
        assert len(said["sha256"]) == 64
    wrong = STRICT.replace("memory:", "memoire:")
    line = next(number for number, text in enumerate(wrong.splitlines(), 1) if "memoire" in text)
    said = there.client.post("/v1/admin/policies/validate", content=wrong, headers=YAML).json()
    assert (said["valid"], said["sha256"]) == (False, None)
    assert {"line": line, "is": "sandbox.memoire: is not a key of policies; policies/README.md lists them"} in said[
        "faults"
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]"),
        "a: &a [*a]",
        "{" * 10_000,
        "a: [" * 50,
        '"a\\nb": 1',
        "!!python/object:os.system x",
        "\x00",
        "a: 1\na: 2",
        *("x" * 65_537, "? [a]\n: b", '"\\ud800": 1', "- \u2028: 1", "models: {root: [\u2028]}\n'a\u0085b': 1"),
    ],
)
def test_texts_that_are_no_policies(there: Small, text: str):
    add(there)
    for sent in ({"content": text.encode(), "headers": YAML}, {"json": {"yaml": text}}):
        answer = there.client.post("/v1/admin/policies/validate", **sent)
        if answer.status_code not in (413, 422):  # what is too long, or too much, for the form of the request
            said = answer.json()
            assert said["valid"] is False
            assert said["faults"], said
        answer = there.client.put("/v1/admin/tenants/acme/policy", **sent)
        assert answer.status_code == 422, answer.text
    assert there.client.get("/v1/admin/tenants/acme").json()["policy"] is None


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"content": b"\xff", "headers": YAML}, 400),
        ({"content": b"{", "headers": JSON}, 400),
        ({"content": b'{"yaml": "\\ud800"}', "headers": JSON}, 400),
        ({"content": b"a" * 600_000, "headers": YAML}, 413),
        ({"content": STRICT}, 415),
        ({"content": STRICT, "headers": {"Content-Type": "text/plain"}}, 415),
        ({"json": {}}, 422),
        ({"json": {"yaml": 1}}, 422),
        ({"json": {"yaml": STRICT, "more": 1}}, 422),
        ({"json": [STRICT]}, 422),
    ],
)
def test_bodies_that_hold_no_text(there: Small, sent: dict[str, Any], status: int):
    add(there)
    for method, path in (
        ("POST", "policies/validate"),
        ("PUT", "tenants/acme/policy"),
        ("POST", "tenants/acme/policy/dry-run"),
    ):
        answer = there.client.request(method, f"/v1/admin/{path}", **sent)
        assert answer.status_code == status, answer.text
        ProblemBody.model_validate(answer.json())


def test_a_policy_is_put_in_force(there: Small):
    add(there)
    tried = there.client.post("/v1/admin/tenants/acme/policy/dry-run", content=STRICT, headers=YAML).json()
    assert there.client.get("/v1/admin/tenants/acme").json()["policy"] is None, "nothing has happened yet"
    done = there.client.put("/v1/admin/tenants/acme/policy", content=STRICT, headers=YAML).json()
    assert done["policy_sha256"] == tried["sha256"]
    assert done["effective_policy_sha256"] == tried["effective_sha256"]
    again = there.client.post("/v1/admin/tenants/acme/policy/dry-run", content=STRICT, headers=YAML).json()
    assert [row["change"] for row in again["changes"] if row["change"] != "none"] == []
    assert there.client.delete("/v1/admin/tenants/acme/policy").status_code == 204
    assert there.client.get("/v1/admin/tenants/acme").json()["policy"] is None
    assert [action for action, _ in actions(there)] == ["tenant.added", "policy.set", "policy.removed"]


def test_a_policy_that_is_shown_can_be_sent_back(there: Small):
    made = add(there, policy=STRICT)
    assert (made["policy"]["models"]["root"], made["policy"]["time"]["idle"]) == (["*"], "1 min")
    assert made["policy_yaml"].startswith("models:\n  root: ['*']\n")
    changed = json.dumps({**made["policy"], "time": {**made["policy"]["time"], "idle": "30 s"}})
    for sent, idle in ((made["policy_yaml"], "1 min"), (changed, "30 s"), (json.dumps(made["policy"]), "1 min")):
        shown = there.client.put("/v1/admin/tenants/acme/policy", json={"yaml": sent}).json()
        assert shown["policy"]["time"]["idle"] == idle
    assert {**shown, "created_at": ""} == {**made, "created_at": ""}


def test_what_a_policy_would_change(there: Small):
    add(there)
    text = (POLICIES / "default.yaml").read_text()
    text = text.replace("tenant_day: 20 USD", "tenant_day: 2 USD").replace("depth: 1", "depth: 3")
    at = datetime.now(UTC)
    purses = [Scope(f"tenant-day:acme:{at:%Y-%m-%d}", 10**10), Scope(f"tenant-month:acme:{at:%Y-%m}", 10**12)]
    db = there.service.platform.db

    def spend(tx: Any) -> None:
        ledger.open_scopes(tx, purses)
        ledger.reserve(tx, "r1", "q", "root", 3 * 10**9, purses)
        ledger.settle(tx, "r1", 1_500_000_000)
        ledger.reserve(tx, "r2", "q", "root", 10**9, purses)

    db.write_sync(spend)
    said = there.client.post("/v1/admin/tenants/acme/policy/dry-run", content=text, headers=YAML).json()
    assert said["changes"] == [
        {
            "key": "money.tenant_day",
            "now": "20.00 USD",
            "then": "2.00 USD",
            "change": "narrower",
            "beyond_platform": False,
        },
        {"key": "counts.depth", "now": 1, "then": 1, "change": "none", "beyond_platform": True},
    ]
    assert said["day"] == {"spent_usd": "1.50", "held_usd": "1.00", "limit_usd": "2.00", "over": True}
    assert said["month"] == {"spent_usd": "1.50", "held_usd": "1.00", "limit_usd": "200.00", "over": False}


# What everything has in common

ROUTES = [
    ("GET", "tenants"),
    ("POST", "tenants"),
    ("GET", "tenants/acme"),
    ("POST", "tenants/acme/suspend"),
    ("POST", "tenants/acme/restore"),
    ("GET", "tenants/acme/keys"),
    ("POST", "tenants/acme/keys"),
    ("DELETE", "tenants/acme/keys/aaaaaaaaaaaa"),
    ("PUT", "tenants/acme/issuer"),
    ("DELETE", "tenants/acme/issuer"),
    ("POST", "policies/validate"),
    ("POST", "tenants/acme/policy/dry-run"),
    ("PUT", "tenants/acme/policy"),
    ("DELETE", "tenants/acme/policy"),
]


def test_these_are_all_of_them(there: Small):
    found = {
        (method.upper(), path.removeprefix("/v1/admin/"))
        for path, item in there.app.openapi()["paths"].items()
        for method in item
        if path.startswith("/v1/admin/")
    }
    listed = {(method, path.replace("acme", "{tenant}").replace("a" * 12, "{key}")) for method, path in ROUTES}
    assert found == listed


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nobody_else_administers(there: Small, method: str, path: str):
    add(there)
    everything = there.bearer("query", "read", "audit", "metrics")
    before = actions(there)
    for headers, status, kind in (
        ({"Authorization": "Bearer x"}, 401, "unauthorized"),
        (everything, 403, "insufficient-scope"),
    ):
        answer = there.client.request(
            method, f"/v1/admin/{path}", headers={**headers, "Content-Type": "application/json"}, content=b"{}"
        )
        problem(answer, status, kind)
    assert actions(there) == before


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path in ROUTES if "acme" in path])
def test_a_tenant_that_is_not_there(there: Small, method: str, path: str):
    sent: dict[str, Any] = {}
    if path.endswith("issuer") and method == "PUT":
        sent = {"content": issuer().model_dump_json(), "headers": JSON}
    elif "policy" in path:
        sent = {"content": STRICT, "headers": YAML}
    elif path.endswith("keys") and method == "POST":
        sent = {"json": {}}
    for name in ("nobody", "A" * 64):
        answer = there.client.request(method, f"/v1/admin/{path.replace('acme', name)}", **sent)
        problem(answer, 404, "not-found")
    for name in ("%00", "a%0A", "..%2Fx", "%ED%A0%80", "%FF", "a" * 65, "-a", "a%20b"):
        answer = there.client.request(method, f"/v1/admin/{path.replace('acme', name)}", **sent)
        assert answer.status_code in (404, 422), answer.text
        ProblemBody.model_validate(answer.json())


@pytest.mark.parametrize("path", ["tenants", "tenants/acme/keys"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\xff", 400),
        (b"1", 422),
        (b"null", 422),
        (b'{"name": "a", "label": "a", "more": 1}', 422),
        (b'{"name": "a\\u0000", "label": "\\u0000"}', 422),
        (b'{"name": "\\ud800", "label": "\\ud800"}', 422),
        (b'{"name": 1, "label": 1}', 422),
        (b'{"name": {"a": 1}, "scopes": "read"}', 422),
        (b'{"scopes": []}', 422),
        (b'{"scopes": ["root"]}', 422),
        (b'{"expires_at": 9}', 422),
        (b'{"expires_at": "2001-01-01T00:00:00Z"}', 422),
        (b'{"expires_at": "\\u0000"}', 422),
        (b'{"name": ' + b"9" * 5000 + b"}", 400),
    ],
)
def test_bodies_that_are_not_taken(there: Small, path: str, body: bytes, status: int):
    add(there)
    answer = there.client.post(f"/v1/admin/{path}", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    ProblemBody.model_validate(answer.json())
    assert len(actions(there)) == 1


@quick
@given(st.dictionaries(st.sampled_from(["name", "policy"]), st.text() | st.none() | st.integers()))
def test_nothing_that_is_sent_is_a_fault_of_the_service(tmp_path_factory: pytest.TempPathFactory, sent: dict[str, Any]):
    with small(tmp_path_factory.mktemp("there")) as there:
        headers = there.bearer("admin", tenant="ops")
        answer = there.client.post("/v1/admin/tenants", content=json.dumps(sent), headers={**headers, **JSON})
        assert answer.status_code in (201, 409, 422), answer.text
