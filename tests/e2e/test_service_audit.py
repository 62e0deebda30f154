"""The journal over HTTP: what an auditor of a tenant can read, check, take away and run again."""

from __future__ import annotations

import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import rfc8785

from orchestrator.auditing import check_proof
from orchestrator.core.merkle import leaf_hash
from orchestrator.core.notes import Verifier, open_checkpoint
from orchestrator.core.policy_file import parse_policy
from tests.command import Airlock, children, until
from tests.service import SCRIPT, SLOW, ask, registry, served

NAMES = ["integrity", "append-only", "completeness", "payloads", "freshness"]
LONG_S = 6
LONG = f"""
root:
  - |
    ```repl
    import time
    time.sleep({LONG_S})
    ```
  - FINAL(done)
"""


def test_records_are_read_in_pages_and_hash_to_their_chain(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        query = ask(client)["id"]
        links: list[Any] = []
        after: int | None = -1
        while after is not None:
            page = get(client, query, f"records?after={after}&limit=3").json()
            links += page["records"]
            after = page["next"]
        assert [link["record"] for link in links] == airlock.records(query)
        before = "0" * 64
        for link in links:
            assert link["record"]["prev"] == before
            before = leaf_hash(rfc8785.dumps(link["record"])).hex()
            assert link["hash"] == before
        assert before == client.get(f"/v1/queries/{query}").json()["journal_head"]


def test_a_query_that_is_whole_has_five_verdicts_that_hold(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        for _ in range(2):
            query = ask(client)["id"]
        checked = get(client, query, "verify").json()
        assert [verdict["name"] for verdict in checked["verdicts"]] == NAMES
        assert checked["whole"], checked


def test_of_a_query_that_goes_on_only_completeness_is_open(airlock: Airlock):
    with served(airlock, script=SLOW) as server, server.client() as client:
        query = ask(client, wait=0)["id"]
        until(lambda: client.get(f"/v1/queries/{query}").json()["status"] == "running")
        checked = get(client, query, "verify").json()
        assert [verdict["name"] for verdict in checked["verdicts"] if not verdict["holds"]] == ["completeness"]
        assert "has no end" in checked["verdicts"][2]["detail"]
        assert get(client, query, "export").status_code == 200
        assert post(client, query).json()["type"] == "urn:airlock:still-running"
        client.post(f"/v1/queries/{query}/cancel")


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ("UPDATE records SET record=replace(record, '\"root\"', '\"loot\"') WHERE query=:q AND seq=2", "integrity"),
        ("DELETE FROM records WHERE query=:q AND seq=3", "completeness"),
        ("DELETE FROM payloads WHERE query=:q AND seq=0 AND name='question'", "payloads"),
        ("UPDATE queries SET status='failed' WHERE id=:q", "completeness"),
        ("UPDATE reservations SET settled=settled+1 WHERE query=:q", "completeness"),
        ("DELETE FROM checkpoints WHERE log='tenants/acme'", "integrity"),
    ],
)
def test_a_journal_that_was_changed_is_found_out(airlock: Airlock, change: str, failing: str):
    with served(airlock) as server, server.client() as client:
        query = ask(client)["id"]
        database = airlock.home / "airlock.db"
        with closing(sqlite3.connect(database)) as db:
            before = list(db.iterdump())
            with db:
                assert db.execute(change, {"q": query}).rowcount, "nothing was changed"
        checked = get(client, query, "verify").json()
        assert not checked["whole"]
        verdict = next(verdict for verdict in checked["verdicts"] if verdict["name"] == failing)
        assert not verdict["holds"], checked
        assert verdict["faults"]
        assert verdict["detail"].startswith(verdict["faults"][0])
    restore(database, before)


def test_proof_and_checkpoint_are_signed_by_the_key_and_of_the_tenants_log_alone(airlock: Airlock):
    with served(airlock) as server, server.client() as client, server.client("other") as other:
        query = ask(client)["id"]
        ask(other)
        verifier = Verifier.read(client.get("/v1/audit/key").text)
        assert client.get("/v1/audit/key").text == other.get("/v1/audit/key").text
        record = check_proof(get(client, query, "proof/3").text, verifier)
        assert json.loads(record) == airlock.records(query)[3]
        head = open_checkpoint(client.get("/v1/audit/checkpoint").text, verifier)
        assert head.origin == f"{verifier.name}/tenants/acme"
        entries = airlock.rows("SELECT count(*) FROM records WHERE log='tenants/acme'")[0][0]
        assert head.size == entries
        assert get(client, query, "proof/4000").json()["detail"] == "there is no such record"


def test_that_the_log_went_on_from_a_checkpoint_that_is_held_is_checked_without_the_service(airlock: Airlock):
    with served(airlock) as server, server.client() as client, server.client("other") as other:
        ask(client)
        held, key = client.get("/v1/audit/checkpoint").text, client.get("/v1/audit/key").text.strip()
        old = int(held.splitlines()[1])
        ask(client)
        ask(other)
        grown = client.get(f"/v1/audit/consistency/{old}").text
        now = client.get("/v1/audit/checkpoint").text
        at_once = client.get(f"/v1/audit/consistency/{now.splitlines()[1]}").text
        shorter = client.get(f"/v1/audit/consistency/{old - 1}").text
        of_the_other = other.get("/v1/audit/consistency/1").text
        assert client.get("/v1/audit/consistency/4000").status_code == 404
        assert client.get("/v1/audit/consistency/0").status_code == 422
    mine, newer = airlock.file("held", held), airlock.file("newer", now)

    def checked(text: str, *checkpoints: Path, code: int) -> str:
        options = [part for file in checkpoints for part in ("--checkpoint", file)]
        proof = airlock.file("grown.tlog-consistency", text)
        done = airlock("audit", "verify", proof, *options, "--key", key, code=code)
        return done.out if code == 0 else done.said

    assert f"went on from what you hold, and has {now.splitlines()[1]} entries" in checked(grown, mine, code=0)
    checked(at_once, newer, code=0)
    steps = grown.splitlines(keepends=True)
    for text, file, says in (
        (steps[0] + "".join(steps[2:]), mine, "does not go on from the checkpoint"),
        (f"{steps[0]}{'A' * 43}=\n" + "".join(steps[2:]), mine, "proves nothing"),
        (grown.replace("/acme\n", "/acmf\n"), mine, "the note was changed"),
        (grown, newer, "and the checkpoint at"),
        (shorter, mine, f"it begins at {old - 1}, and the checkpoint at {old}"),
        (of_the_other, mine, "it is of"),
        ("no proof", mine, "no proof that a log went on"),
    ):
        assert says in checked(text, file, code=2)
    assert "give it with --checkpoint" in checked(grown, code=2)
    assert "give it with --checkpoint" in checked(grown, mine, newer, code=2)


def test_an_export_is_checked_without_the_service(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        query = ask(client)["id"]
        sent = get(client, query, "export")
        assert sent.headers["Content-Disposition"] == f'attachment; filename="airlock-{query}.tar"'
        assert sent.headers["Content-Type"] == "application/x-tar"
        assert int(sent.headers["Content-Length"]) == len(sent.content)
        tar = airlock.file("export.tar", sent.content)
        key = client.get("/v1/audit/key").text.strip()
        before = files_of(airlock.home)
        assert get(client, query, "export").content == sent.content
        assert files_of(airlock.home) == before
    checked = airlock("audit", "verify", tar, "--key", key, "--json", code=0).json
    assert all(verdict["holds"] for verdict in checked.values())
    airlock.file("export.tar", sent.content.replace(b"it is short", b"it is large"))
    airlock("audit", "verify", tar, "--key", key, code=1)


def test_verdicts_speak_of_no_command_line(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        verdicts = get(client, ask(client)["id"], "verify").json()["verdicts"]
        assert "keep one, and have /v1/audit/consistency go on from it" in verdicts[1]["detail"]
        assert not any("--" in verdict["detail"] for verdict in verdicts)


def test_more_than_a_thousand_records_are_verified(airlock: Airlock):
    """How long it takes, tests/benchmarks/service.py says."""
    many = SCRIPT.replace('llm_query("Is this long? " + context[:20])', "llm_query_batched(['x'] * 500)[0]")
    with served(airlock, script=many) as server, server.client() as client:
        query = ask(client, wait=60)
        assert query["status"] == "answered", query
        assert len(airlock.records(query["id"])) > 1000
        assert get(client, query["id"], "verify").json()["whole"]


def test_a_query_is_run_again(airlock: Airlock):
    with served(airlock) as server, server.client() as client:
        query = ask(client)["id"]
        before = airlock.rows("SELECT count(*) FROM records"), airlock.rows("SELECT count(*) FROM reservations")
        done = post(client, query).json()
        assert done["same"], done
        assert done["id"] == query
        assert [(cell["node"], cell["cell"], cell["verdict"]) for cell in done["cells"]] == [
            ("root", 1, "same"),
            ("root", 2, "same"),
        ]
        assert before == (
            airlock.rows("SELECT count(*) FROM records"),
            airlock.rows("SELECT count(*) FROM reservations"),
        )
        with closing(sqlite3.connect(airlock.home / "airlock.db")) as db, db:
            kept = db.execute("SELECT * FROM payloads WHERE query=?", (query,)).fetchall()
            db.execute("DELETE FROM payloads WHERE query=? AND name='code'", (query,))
        assert post(client, query).status_code == 409
        with closing(sqlite3.connect(airlock.home / "airlock.db")) as db, db:
            db.executemany("INSERT OR REPLACE INTO payloads VALUES (?, ?, ?, ?)", kept)


def test_what_a_replay_finds_different_is_shown(airlock: Airlock):
    """What differs from run to run: a cell that prints the time."""
    script = SCRIPT.replace("print(len(context))", "import time; print(time.time_ns())")
    with served(airlock, script=script) as server, server.client() as client:
        done = post(client, ask(client)["id"]).json()
        assert not done["same"]
        assert any(line.startswith("+1") for line in done["cells"][0]["diff"]), done


def test_replays_are_few_and_end_with_who_waits_for_them(airlock: Airlock):
    with served(airlock, script=LONG) as server, server.client() as client:
        query = ask(client)["id"]

        def is_begun(_look: int = 0) -> bool:
            """Whether one was begun, for which nobody waits any more after a moment."""
            try:
                assert post(client, query, timeout=0.5).status_code == 429
            except httpx2.ReadTimeout:
                return True
            return False

        assert is_begun()
        until(is_begun, LONG_S - 2)  # the first one would not have ended by itself
        until(lambda: not children(server.process.pid), LONG_S - 2)
        with ThreadPoolExecutor(2) as threads:
            both = list(threads.map(lambda _: post(client, query), range(2)))
        assert sorted(answer.status_code for answer in both) == [200, 429]
        assert int(next(answer for answer in both if answer.status_code == 429).headers["Retry-After"]) > 0


def test_a_replay_ends_with_its_time_and_says_what_it_did_not_run(airlock: Airlock):
    """The tenant's policy has less time now than the query had then."""
    with served(airlock, script=LONG) as server, server.client() as client:
        query = ask(client)["id"]
        policy = parse_policy(airlock.policy(time_query="1 s", time_cell="1 s", time_idle="1 s").read_text(), "shorter")
        with registry(airlock) as known:
            known.set_policy("acme", policy, by="a test")
        begun = time.monotonic()
        done = post(client, query).json()
        assert time.monotonic() - begun < LONG_S
        assert done["cells"][0]["verdict"] == "not compared"
        assert "the 1 s for it all were over" in done["cells"][0]["why"]


def test_a_stopped_service_ends_a_replay(airlock: Airlock):
    with served(airlock, script=LONG) as server, server.client() as client:
        query = ask(client)["id"]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(lambda: post(client, query))
            until(lambda: children(server.process.pid))
            assert server.stop() == 0
            assert waiting.result().json()["type"] == "urn:airlock:stopping"


def test_a_key_without_the_scope_audits_nothing(airlock: Airlock):
    with served(airlock) as server, server.client() as client, server.client("acme", "query", "read") as reader:
        query = ask(client)["id"]
        paths = ("records", "verify", "proof/0", "export")
        refused = [get(reader, query, path) for path in paths]
        refused += [post(reader, query), reader.get("/v1/audit/key"), reader.get("/v1/audit/checkpoint")]
        assert [answer.json()["type"] for answer in refused] == ["urn:airlock:insufficient-scope"] * len(refused)


def get(client: httpx2.Client, query: str, what: str) -> httpx2.Response:
    return client.get(f"/v1/audit/queries/{query}/{what}")


def post(client: httpx2.Client, query: str, **options: Any) -> httpx2.Response:
    return client.post(f"/v1/audit/queries/{query}/replay", **options)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def restore(database: Path, dump: list[str]) -> None:
    """The database as it was: what the common check after every test looks at."""
    for path in database.parent.glob("airlock.db*"):
        path.unlink()
    with closing(sqlite3.connect(database)) as db:
        db.executescript("\n".join(dump))
