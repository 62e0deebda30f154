"""Two tenants, hostile to each other: every route of the service with the ids, cursors and keys of the other.

What is another tenant's is answered byte for byte as what never existed is, and in the same time. Each check is shown
to find what it is there for on a service that is weakened.
"""

from __future__ import annotations

import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import httpx2
import pytest
from fastapi.routing import iter_route_contexts

from orchestrator.server.app import make_app
from orchestrator.server.paging import make_cursor
from orchestrator.server.service import Service
from tests.command import Airlock
from tests.service import SCRIPT, Served, ask, served

TEXT = "the bell of Ulm rang at nine"
CONFIG = "[server]\nrequests_minute = 1000000\n"
OWN = {"date", "x-request-id", "ratelimit", "content-length"}  # of each answer; the length is the body's
PASSES = re.compile(  # ids, times and hashes
    r"[0-9]{8}-[0-9]{6}-[0-9a-f]{10}|[0-9a-f]{32}|[0-9]{4}-[0-9-]{5}T[0-9:.]+Z|[A-Z][a-z]{2}, [0-9A-Za-z: ]+ GMT"
    r'|"(created|duration_s)": ?[0-9.]+'
)
TUS = {"Tus-Resumable": "1.0.0"}
ROUNDS, RATIO, SECONDS, TRIES = 200, 1.2, 0.0005, 3


@dataclass(frozen=True, slots=True)
class Names:
    """What a request can name. Of the victim, or of nobody."""

    tenant: str
    query: str
    context: str
    upload: str
    key: str
    queries_cursor: str
    contexts_cursor: str
    idempotency: str
    content: bytes  # of a context that is theirs; whoever has the bytes may have it, too
    seq: int
    model: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A request. status: of the answer. own: it is answered out of the asker's own, with ids and times of its own."""

    method: str
    path: str
    status: int = 404
    headers: dict[str, str] | None = None
    content: Any = None
    own: bool = False

    def by(self, client: httpx2.Client) -> httpx2.Response:
        if isinstance(self.content, (dict, list)):
            return client.request(self.method, self.path, headers=self.headers, json=self.content)
        return client.request(self.method, self.path, headers=self.headers, content=self.content)


def of_query(method: str, what: str = "", **more: Any) -> Callable[[Names], list[Sent]]:
    return lambda names: [Sent(method, f"/v1/queries/{names.query}{what}", **more)]


def of_audit(method: str, what: str) -> Callable[[Names], list[Sent]]:
    return lambda names: [Sent(method, f"/v1/audit/queries/{names.query}/{what}")]


def of_upload(method: str, **more: Any) -> Callable[[Names], list[Sent]]:
    return lambda names: [Sent(method, f"/v1/contexts/uploads/{names.upload}", **more)]


def of_context(method: str) -> Callable[[Names], list[Sent]]:
    return lambda names: [Sent(method, f"/v1/contexts/{names.context}")]


def of_tenant(method: str, what: str = "", content: Any = None) -> Callable[[Names], list[Sent]]:
    """For whoever runs the service: a tenant is told nothing there, of itself or of others."""
    return lambda names: [
        Sent(method, f"/v1/admin/tenants/{names.tenant}{what}".replace("{key}", names.key), 403, content=content)
    ]


def always(method: str, path: str, status: int = 200, **more: Any) -> Callable[[Names], list[Sent]]:
    """It names nothing of anybody's."""
    return lambda _names: [Sent(method, path, status, **more)]


def asked(context: dict[str, str], status: int, key: str | None = None) -> Sent:
    headers = {"Prefer": "wait=30"} | ({"Idempotency-Key": key} if key else {})
    body = {"question": "Is it long?", "context": context}
    return Sent("POST", "/v1/queries", status, headers, body, own=status == 200)


def chat(names: Names, content: Any, status: int, key: str | None = None, *, stream: bool = False) -> Sent:
    headers = {"Idempotency-Key": key} if key else None
    body = {"model": names.model, "messages": [{"role": "user", "content": content}], "stream": stream}
    return Sent("POST", "/v1/chat/completions", status, headers, body, own=status == 200)


def a_file(names: Names) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "Is it long?"}, {"type": "file", "file": {"file_id": names.context}}]


PATCH = {"Upload-Offset": "4", "Content-Type": "application/offset+octet-stream"}
MATRIX: dict[tuple[str, str], Callable[[Names], list[Sent]]] = {
    ("GET", "/openapi.json"): always("GET", "/openapi.json"),
    ("HEAD", "/openapi.json"): always("HEAD", "/openapi.json"),
    ("POST", "/v1/queries"): lambda names: [
        asked({"id": names.context}, 404),
        asked({"text": TEXT}, 200, names.idempotency),
    ],
    ("GET", "/v1/queries"): lambda names: [
        Sent("GET", "/v1/queries", 200),
        Sent("GET", f"/v1/queries?cursor={names.queries_cursor}", 200),
    ],
    ("GET", "/v1/queries/{query}"): of_query("GET"),
    ("POST", "/v1/queries/{query}/cancel"): of_query("POST", "/cancel"),
    ("GET", "/v1/queries/{query}/spend"): of_query("GET", "/spend"),
    ("GET", "/v1/queries/{query}/events"): lambda names: [
        Sent("GET", f"/v1/queries/{names.query}/events"),
        Sent("GET", f"/v1/queries/{names.query}/events?after={names.seq}"),
        Sent("GET", f"/v1/queries/{names.query}/events", headers={"Last-Event-ID": str(names.seq)}),
    ],
    ("GET", "/v1/budgets"): always("GET", "/v1/budgets"),
    ("PUT", "/v1/contexts"): lambda names: [
        Sent("PUT", "/v1/contexts?name=mine", 201, content=names.content, own=True)
    ],
    ("OPTIONS", "/v1/contexts"): always("OPTIONS", "/v1/contexts", 204),
    ("POST", "/v1/contexts"): always("POST", "/v1/contexts", 201, headers=TUS | {"Upload-Length": "5"}, own=True),
    ("GET", "/v1/contexts"): lambda names: [
        Sent("GET", "/v1/contexts", 200),
        Sent("GET", f"/v1/contexts?limit=1&cursor={names.contexts_cursor}", 200),
    ],
    ("OPTIONS", "/v1/contexts/uploads/{upload}"): of_upload("OPTIONS", status=204),
    ("HEAD", "/v1/contexts/uploads/{upload}"): of_upload("HEAD", headers=TUS),
    ("PATCH", "/v1/contexts/uploads/{upload}"): of_upload("PATCH", headers=TUS | PATCH, content=b"x"),
    ("GET", "/v1/contexts/uploads/{upload}"): of_upload("GET"),
    ("DELETE", "/v1/contexts/uploads/{upload}"): of_upload("DELETE", headers=TUS),
    ("GET", "/v1/contexts/{context}"): of_context("GET"),
    ("DELETE", "/v1/contexts/{context}"): of_context("DELETE"),
    ("GET", "/v1/audit/queries/{query}/records"): of_audit("GET", "records"),
    ("GET", "/v1/audit/queries/{query}/verify"): of_audit("GET", "verify"),
    ("GET", "/v1/audit/queries/{query}/proof/{seq}"): of_audit("GET", "proof/1"),
    ("GET", "/v1/audit/queries/{query}/export"): of_audit("GET", "export"),
    ("POST", "/v1/audit/queries/{query}/replay"): of_audit("POST", "replay"),
    ("GET", "/v1/audit/checkpoint"): always("GET", "/v1/audit/checkpoint"),
    ("GET", "/v1/audit/consistency/{old}"): always("GET", "/v1/audit/consistency/1"),
    ("GET", "/v1/audit/key"): always("GET", "/v1/audit/key"),
    ("POST", "/v1/admin/policies/validate"): always(
        "POST", "/v1/admin/policies/validate", 403, content={"policy": "models: {}"}
    ),
    ("POST", "/v1/admin/tenants/{tenant}/policy/dry-run"): of_tenant("POST", "/policy/dry-run", {"policy": "x"}),
    ("PUT", "/v1/admin/tenants/{tenant}/policy"): of_tenant("PUT", "/policy", {"policy": "x"}),
    ("DELETE", "/v1/admin/tenants/{tenant}/policy"): of_tenant("DELETE", "/policy"),
    ("GET", "/v1/admin/tenants"): always("GET", "/v1/admin/tenants", 403),
    ("POST", "/v1/admin/tenants"): lambda names: [
        Sent("POST", "/v1/admin/tenants", 403, content={"name": names.tenant})
    ],
    ("GET", "/v1/admin/tenants/{tenant}"): of_tenant("GET"),
    ("POST", "/v1/admin/tenants/{tenant}/suspend"): of_tenant("POST", "/suspend"),
    ("POST", "/v1/admin/tenants/{tenant}/restore"): of_tenant("POST", "/restore"),
    ("GET", "/v1/admin/tenants/{tenant}/keys"): of_tenant("GET", "/keys"),
    ("POST", "/v1/admin/tenants/{tenant}/keys"): of_tenant("POST", "/keys", {"label": "mine"}),
    ("DELETE", "/v1/admin/tenants/{tenant}/keys/{key}"): of_tenant("DELETE", "/keys/{key}"),
    ("PUT", "/v1/admin/tenants/{tenant}/issuer"): of_tenant("PUT", "/issuer", {"issuer": "https://evil.example"}),
    ("DELETE", "/v1/admin/tenants/{tenant}/issuer"): of_tenant("DELETE", "/issuer"),
    ("POST", "/v1/chat/completions"): lambda names: [
        chat(names, a_file(names), 404),
        chat(names, a_file(names), 404, stream=True),
        chat(names, "Is it long?", 200, f"{names.idempotency}, for chats"),
    ],
    ("GET", "/v1/models"): always("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"): always("GET", "/v1/models/none", 404),
    ("GET", "/healthz"): always("GET", "/healthz"),
    ("GET", "/readyz"): always("GET", "/readyz"),
    ("GET", "/metrics"): always("GET", "/metrics", 403),
    ("GET", "/v1/session"): always("GET", "/v1/session"),
    ("GET", "/"): always("GET", "/"),
    ("HEAD", "/"): always("HEAD", "/"),
    ("GET", "/q/{query}"): lambda names: [Sent("GET", f"/q/{names.query}", 200)],
    ("HEAD", "/q/{query}"): lambda names: [Sent("HEAD", f"/q/{names.query}", 200)],
    ("GET", "/login"): always("GET", "/login"),
    ("HEAD", "/login"): always("HEAD", "/login"),
    ("GET", "/static/{name}"): always("GET", "/static/style.css"),
    ("HEAD", "/static/{name}"): always("HEAD", "/static/style.css"),
    ("POST", "/login"): lambda names: [Sent("POST", "/login", 401, content={"key": stranger(names.key)})],
    ("POST", "/logout"): always("POST", "/logout", 204),
}


def stranger(key: str) -> str:
    """A key with this id, and a secret that it does not have."""
    from orchestrator.core.api_keys import ApiKey

    return ApiKey(key, "0" * 43).text


def test_every_route_of_the_service_is_in_the_matrix():
    app = make_app(cast("Service", None))
    shown = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    found = {
        (method, str(route.path).replace(":path}", "}"))
        for route in iter_route_contexts(app.routes)
        for method in route.methods or ()
    }
    assert shown <= found
    assert found == set(MATRIX)


@dataclass(slots=True)
class Battle:
    """A service with a victim, which has one of everything, and a hostile tenant."""

    server: Served
    victim: httpx2.Client
    hostile: httpx2.Client
    theirs: Names
    nobodys: Names
    marks: list[str]  # what nobody but the victim may see


@contextmanager
def battle(airlock: Airlock) -> Iterator[Battle]:
    with (
        served(airlock, script=SCRIPT.replace("context[:20]", "str(context)[:20]"), config=CONFIG) as server,
        server.client("victim") as victim,
        server.client("hostile") as hostile,
    ):
        done = [ask(victim, TEXT, context={"text": TEXT}) for _ in range(2)][-1]
        contents = [f"{TEXT} {number}".encode() for number in range(3)]
        kept = [victim.put(f"/v1/contexts?name=Ulm{len(one)}", content=one).json() for one in contents]
        upload = victim.post("/v1/contexts", headers=TUS | {"Upload-Length": "100"}).json()["id"]
        path = f"/v1/contexts/uploads/{upload}"
        piece = TUS | PATCH | {"Upload-Offset": "0"}
        assert victim.patch(path, headers=piece, content=b"Ulm ").status_code == 204
        body = {"question": "Is it long?", "context": {"text": TEXT}}
        key = "the key of the victim"
        replayed = victim.post("/v1/queries", json=body, headers={"Idempotency-Key": key, "Prefer": "wait=30"})
        theirs = Names(
            "victim",
            done["id"],
            kept[0]["id"],
            upload,
            server.key("victim").split("_")[1],
            make_cursor("queries", done["created_at"], done["id"]),
            make_cursor("contexts", kept[1]["created_at"], kept[1]["id"]),
            key,
            contents[2],
            seq=3,
            model=victim.get("/v1/models").json()["data"][0]["id"],
        )
        assert chat(theirs, "Is it long?", 200, f"{key}, for chats").by(victim).status_code == 200
        nobodys = replace(
            theirs,
            tenant="nobody",
            query=other(theirs.query),
            context=other(theirs.context),
            upload=other(theirs.upload),
            key=theirs.key[:-1] + ("a" if theirs.key[-1] != "a" else "b"),
            queries_cursor=make_cursor("queries", done["created_at"], other(done["id"])),
            contexts_cursor=make_cursor("contexts", kept[1]["created_at"], other(kept[1]["id"])),
            idempotency="a key of nobody",
            content=f"{TEXT} 9".encode(),
            seq=4000,
        )
        marks = ["Ulm", done["id"], replayed.json()["id"], upload, *(one["id"] for one in kept[:2]), theirs.key]
        yield Battle(server, victim, hostile, theirs, nobodys, marks)


def other(name: str) -> str:
    """Of the same form, and never given out."""
    return name[:-4] + ("0000" if name[-4:] != "0000" else "1111")


def leaks(fight: Battle) -> list[str]:
    """What the hostile tenant learns, a line each."""
    found: list[str] = []
    for route, requests in MATRIX.items():
        for theirs, nobodys in zip(requests(fight.theirs), requests(fight.nobodys), strict=True):
            answers = [told(one.by(fight.hostile), own=one.own) for one in (theirs, nobodys)]
            if answers[0] != answers[1]:
                found.append(f"{route}: what is theirs is answered unlike what is nobody's: {answers}")
            if answers[0][0] != theirs.status:
                found.append(f"{route}: {answers[0]}")
            found += [f"{route}: {text!r} is shown" for text in fight.marks if text in answers[0][2]]
    return found


def told(answer: httpx2.Response, *, own: bool) -> tuple[int, dict[str, str], str]:
    """All of an answer but what every answer has of its own."""
    headers = {name: value for name, value in answer.headers.items() if name not in OWN}
    text = answer.text
    if own:
        headers = {name: PASSES.sub("*", value) for name, value in headers.items()}
        text = PASSES.sub("*", text)
    return answer.status_code, headers, text


def view_of(client: httpx2.Client, names: Names) -> list[Any]:
    """All that the victim has, as it sees it."""
    paths = (
        "queries",
        f"queries/{names.query}",
        f"queries/{names.query}/spend",
        "contexts",
        f"contexts/{names.context}",
    )
    seen = [client.get(f"/v1/{path}").json() for path in (*paths, f"contexts/uploads/{names.upload}", "budgets")]
    return [*seen, client.get(f"/v1/audit/queries/{names.query}/verify").json()]


def test_nothing_of_a_tenant_is_told_to_another(airlock: Airlock):
    with battle(airlock) as fight:
        before = view_of(fight.victim, fight.theirs)
        assert leaks(fight) == []
        assert view_of(fight.victim, fight.theirs) == before
        with fight.server.client("hostile", "metrics") as watcher:  # of the service as a whole
            shown = watcher.get("/metrics")
        assert shown.status_code == 200
        assert not [mark for mark in ("victim", "hostile", *fight.marks) if mark in shown.text]


@pytest.mark.timeout(400)
@pytest.mark.alone
def test_what_is_anothers_takes_as_long_as_what_never_was(airlock: Airlock):
    with battle(airlock) as fight:
        assert late(fight, MATRIX) == []


@pytest.mark.alone
def test_a_key_that_is_there_is_refused_as_one_that_never_was(airlock: Airlock):
    """By its id alone nobody learns whose keys there are."""
    with battle(airlock) as fight, httpx2.Client(base_url=fight.server.url, trust_env=False) as nobody:

        def requests(names: Names) -> list[Sent]:
            return [Sent("GET", "/v1/budgets", 401, {"Authorization": f"Bearer {stranger(names.key)}"})]

        answers = [
            told(one.by(nobody), own=False) for names in (fight.theirs, fight.nobodys) for one in requests(names)
        ]
        assert answers[0] == answers[1]
        assert answers[0][0] == 401
        fight.hostile = nobody
        assert late(fight, {("GET", "/v1/budgets"): requests}, 401) == []


def late(fight: Battle, matrix: dict[tuple[str, str], Callable[[Names], list[Sent]]], status: int = 404) -> list[str]:
    """Where the time tells what is there. Once may be chance: it has to be so each time that it is looked at."""
    found: list[str] = []
    for route, requests in matrix.items():
        for theirs, nobodys in zip(requests(fight.theirs), requests(fight.nobodys), strict=True):
            if theirs.status == status and theirs != nobodys:
                tries = [medians(fight.hostile, theirs, nobodys)]
                while differ(*tries[-1]) and len(tries) < TRIES:
                    tries.append(medians(fight.hostile, theirs, nobodys))
                if differ(*tries[-1]):
                    found.append(f"{route}: {tries}")
    return found


def differ(one: float, other: float) -> bool:
    return abs(one - other) > SECONDS and max(one, other) > RATIO * min(one, other)


def medians(client: httpx2.Client, *requests: Sent) -> tuple[float, ...]:
    """Seconds of each, by turns."""
    each: list[list[float]] = [[] for _ in requests]
    for _ in range(ROUNDS):
        for sent, times in zip(requests, each, strict=True):
            begun = time.perf_counter()
            answer = sent.by(client)
            times.append(time.perf_counter() - begun)
            assert answer.status_code == sent.status
    return tuple(map(statistics.median, each))


WEAK = {  # what is weakened -> (how, a route at which it shows)
    "another tenant's queries are shown": (
        """
        def own(self, principal, tenant, what="query"):
            if tenant is None: raise not_found(what)
        Service.require_own = own
        """,
        "/v1/queries/{query}",
    ),
    "another tenant's queries are forbidden": (
        """
        whole = Service.require_own
        def own(self, principal, tenant, what="query"):
            if tenant not in (None, principal.tenant): raise Problem(403, "not-permitted", "this is not yours")
            whole(self, principal, tenant, what)
        Service.require_own = own
        """,
        "/v1/queries/{query}/spend",
    ),
    "lists are of all tenants": (
        """
        whole = queries_view.page
        queries_view.page = lambda tx, tenant, *rest: whole(tx, "victim", *rest)
        """,
        "GET', '/v1/queries'",
    ),
    "contexts are of all tenants": (
        """
        whole = holdings.find
        holdings.find = lambda tx, tenant, context: whole(tx, tenant, context) or whole(tx, "victim", context)
        """,
        "/v1/contexts/{context}",
    ),
    "uploads are of all tenants": (
        """
        whole = Uploads.find
        Uploads.find = lambda self, tenant, upload: whole(self, tenant, upload) or whole(self, "victim", upload)
        """,
        "/v1/contexts/uploads/{upload}",
    ),
    "idempotency keys are of all tenants": (
        """
        whole = requests.asked_before
        requests.asked_before = lambda tx, tenant, idempotency: whole(tx, "victim", idempotency)
        """,
        "POST', '/v1/queries'",
    ),
}
IMPORTS = """
import time
from orchestrator.server import queries_view
from orchestrator.server.problems import Problem, not_found
from orchestrator.server.service import Service
from orchestrator.store import holdings, requests
from orchestrator.store.uploads import Uploads
"""


@pytest.mark.parametrize("what", WEAK)
def test_a_service_that_tells_more_is_found_out(airlock: Airlock, what: str):
    how, where = WEAK[what]
    with battle(weakened(airlock, how)) as fight:
        assert [leak for leak in leaks(fight) if where in leak]


@pytest.mark.alone
def test_a_service_that_takes_longer_is_found_out(airlock: Airlock):
    how = """
    whole = Service.require_own
    def own(self, principal, tenant, what="query"):
        if tenant is not None: time.sleep(0.004)
        whole(self, principal, tenant, what)
    Service.require_own = own
    """
    route = ("GET", "/v1/queries/{query}")
    with battle(weakened(airlock, how)) as fight:
        assert late(fight, {route: MATRIX[route]})


def weakened(airlock: Airlock, how: str) -> Airlock:
    """The real service, but for this change."""
    code = f"{IMPORTS}\n{textwrap.dedent(how)}\nfrom orchestrator.cli import main\nmain()"
    airlock.program = (sys.executable, "-c", code)
    return airlock
