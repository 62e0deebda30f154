"""`airlock run --server`: a query that a service runs, as if it ran here."""

from __future__ import annotations

import os
import pty
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.certificate import certificate
from tests.command import Airlock, Done, until
from tests.fakes.relay import Relay
from tests.service import SCRIPT, SLOW, Served, served

LOCAL = ("query_id", "status", "answer", "reason", "cost_usd", "usage", "iterations", "sub_calls", "duration_s")


def run(server: Served, *more: object, url: str = "", **options: Any) -> Done:
    return server.airlock("run", "Is it long?", "--server", url or server.url, *more, **options)


@pytest.fixture
def client(airlock: Airlock) -> Airlock:
    """The command on another machine, with no data folder of its own."""
    airlock.file("documents/a.txt", "one")
    airlock.file("documents/b/c.txt", "two\n")
    airlock.file("documents/d.bin", b"\0")
    return airlock


def let_in(server: Served, *scopes: str) -> None:
    server.airlock.env["AIRLOCK_API_KEY"] = server.key("acme", *scopes)


def test_the_answer_alone_goes_to_standard_output(client: Airlock):
    with served(client) as server:
        let_in(server)
        done = run(server, "--context", "context.txt", code=0)
        assert done.out == "it is short\n"
        texts = [line.partition("] ")[2] for line in done.lines]
        with server.client() as native:
            (query,) = native.get("/v1/queries").json()["queries"]
        assert texts[0] == f"query {query['id']}, budget {query['limit_usd']} USD"
        assert "cell 1: 2 lines" in texts
        assert texts[-1].startswith("answered: 2 turns, 1 sub-call, ")


def test_json_has_what_a_local_run_has(client: Airlock):
    with served(client) as server:
        let_in(server, "query", "read", "audit")
        found = run(server, "--context", "context.txt", "--json", code=0).json
        local = client(
            "run",
            "Is it long?",
            "--context",
            "context.txt",
            "--model",
            f"scripted:{client.folder}/script.yaml",
            "--json",
            code=0,
        ).json
        assert list(found) == list(local)
        same = ("status", "answer", "reason", "cost_usd", "usage", "iterations", "sub_calls", "backend", "isolation")
        assert {name: found[name] for name in same} == {name: local[name] for name in same}
        assert len(found["journal_head"]) == 64
        assert found["checkpoint"].startswith("airlock-")


@pytest.mark.parametrize(
    ("context", "kind", "size"),
    [
        ("context.txt", "text", 33),
        ("data.json", "json", 8),
        ("data.JSONL", "jsonl", 8),
        ("documents", "jsonl", None),
        ("-", "text", 5),
    ],
)
def test_contexts_of_every_kind(client: Airlock, context: str, kind: str, size: int | None):
    client.file("data.json", '{"a": 1}')
    client.file("data.JSONL", "[1]\n[2]\n")
    script = SCRIPT.replace('llm_query("Is this long? " + context[:20])', "str(list(context))")
    with served(client, script=script) as server, server.client() as native:
        let_in(server)
        done = run(server, "--context", context, stdin=b"given", code=0)
        (stored,) = native.get("/v1/contexts").json()["contexts"]
        assert stored["kind"] == kind
        assert size is None or stored["bytes"] == size
        if context == "documents":
            assert done.out == "[{'path': 'a.txt', 'text': 'one'}, {'path': 'b/c.txt', 'text': 'two\\n'}]\n"


def test_what_a_query_may_goes_along(client: Airlock):
    schema = client.file("schema.json", '{"type": "integer"}')
    with served(client, script="root: ['FINAL(42)']") as server, server.client() as native:
        let_in(server)
        model = f"scripted:{client.folder}/script.yaml"
        limits = ("--budget", "0.25", "--timeout", "77.5", "--depth", "0", "--answer-schema", schema)
        run(server, "--context", "context.txt", "--model", model, "--sub-model", model, *limits, code=0)
        (query,) = native.get("/v1/queries").json()["queries"]
        found = native.get(f"/v1/queries/{query['id']}").json()
        assert (found["limit_usd"], found["time_limit_s"], found["sub_models"]) == ("0.25", 77.5, [model])
        assert (found["model"], found["answer"]) == (model, "42")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--backend", "docker"),
        ("--policy", "strict"),
        ("--price", "a=1,1"),
        ("--base-url", "http://x"),
        ("--resume", "x"),
    ],
)
def test_what_makes_no_sense_with_a_server_is_refused(client: Airlock, option: str, value: str):
    said = client("run", "q", "--context", "context.txt", "--server", "https://x", option, value, code=2).said
    assert said.startswith(f"{option} does not go with --server")


def test_a_key_is_needed_and_does_not_go_in_the_clear(client: Airlock):
    given = ("run", "q", "--context", "context.txt", "--server")
    assert "set AIRLOCK_API_KEY" in client(*given, "https://x", code=2).said
    assert "set MINE" in client(*given, "https://x", "--api-key-env", "MINE", code=2).said
    client.env["AIRLOCK_API_KEY"] = "al_x"
    assert "in the clear" in client(*given, "http://192.0.2.1:8080", code=2).said
    assert "in the clear" in client(*given, "http://localhost.example", code=2).said
    for address in ("x", "ftp://x", "https://", "https://user@x", "https://x?a=b", "http://[::1"):
        assert "https://HOST" in client(*given, address, code=2).said
    assert "cannot be reached" in client(*given, "http://127.0.0.1:9", code=4).said


def test_certificates_are_verified(client: Airlock):
    trusted, _context = certificate(client.folder)
    options = ("--tls-cert", trusted, "--tls-key", client.folder / "secret.pem")
    with served(client, *options) as server:
        server.airlock.env["AIRLOCK_API_KEY"] = server.key()
        assert "cannot be reached" in run(server, "--context", "context.txt", code=4).said
        client.env["SSL_CERT_FILE"] = str(trusted)
        assert run(server, "--context", "context.txt", code=0).out == "it is short\n"


def test_what_the_service_refuses_has_its_exit_code(client: Airlock):
    price = f"scripted:{client.folder}/script.yaml=1000,1000"
    with served(client, "--price", price) as server:
        client.env["AIRLOCK_API_KEY"] = "al_unknown"
        assert "valid API key" in run(server, "--context", "context.txt", code=2).said
        let_in(server)
        assert "USD" in run(server, "--context", "context.txt", "--budget", "0.001", code=3).said
        assert "no model 'gone'" in run(server, "--context", "context.txt", "--model", "gone", code=2).said
        assert "is empty" in run(server, "--context", client.file("empty.txt", ""), code=2).said
        assert "no such file" in run(server, "--context", "nowhere.txt", code=2).said


def test_a_limit_and_a_failing_provider_have_theirs(client: Airlock):
    config = '[models."gone"]\nbase_url = "http://127.0.0.1:9/v1"\n'
    looks = "root:\n  - |\n    ```repl\n    while True: pass\n    ```\n"
    with served(client, "--price", "gone=1,1", script=looks, config=config) as server:
        let_in(server)
        assert run(server, "--context", "context.txt", "--timeout", "2", code=3).said.startswith(
            "limit: time-exceeded: "
        )
        assert run(server, "--context", "context.txt", "--model", "gone", code=5).said.startswith(
            "failed: provider-busy"
        )


def test_an_answer_that_is_not_kept_is_said_to_be(client: Airlock):
    policy = client.policy(audit_payloads="hash")
    with served(client, "--policy", policy) as server:
        let_in(server)
        assert "keeps no answers" in run(server, "--context", "context.txt", code=4).said


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cancels_the_query_at_the_service(client: Airlock, how: signal.Signals):
    with served(client, script=SLOW) as server, server.client() as native:
        let_in(server)
        with client.started("run", "q", "--context", "context.txt", "--server", server.url) as running:
            until(lambda: native.get("/v1/queries?status=running").json()["queries"])
            done = running.interrupt(how)
        assert (done.code, done.out, done.said) == (130, "", "cancelled")
        (query,) = native.get("/v1/queries").json()["queries"]
        assert query["status"] == "cancelled"


def test_an_interrupt_while_standard_input_is_read(client: Airlock):
    with served(client) as server, server.client() as native:
        let_in(server)
        with client.started("run", "q", "--context", "-", "--server", server.url) as running:
            until(lambda: _reads(running.process.pid))
            done = running.interrupt()
        assert (done.code, done.said) == (130, "interrupted: the query has not begun")
        assert native.get("/v1/queries").json()["queries"] == []


def _reads(process: int) -> bool:
    """Whether it waits for its standard input."""
    return "pipe" in Path(f"/proc/{process}/wchan").read_text()


def test_a_connection_that_breaks_is_taken_up_again(client: Airlock):
    with (
        served(client, script=SCRIPT + "delay_s: 2\n") as server,
        server.client() as native,
        Relay(server.url) as relay,
    ):
        let_in(server)
        with client.started("run", "q", "--context", "context.txt", "--server", relay.url) as running:
            until(lambda: relay.came and native.get("/v1/queries?status=running").json()["queries"])
            relay.cut()
            done = running.end()
        assert (done.code, done.out) == (0, "it is short\n")
        cells = [line for line in done.lines if "cell 1: " in line]
        assert len(cells) == 1
        assert relay.cuts > 0


def test_a_service_that_is_started_again_is_gone_on_with(client: Airlock):
    config = "[server]\ndrain_s = 0\n"
    slow = SCRIPT + "delay_s: 1\n"
    with Relay() as relay, served(client, script=slow, config=config) as server, server.client() as native:
        let_in(server)
        relay.to(server.url)
        with client.started("run", "q", "--context", "context.txt", "--server", relay.url) as running:
            until(lambda: "cell.ended" in {row["type"] for row in _records(server, native)})
            server.stop()
            with served(client, config=config) as next_one:
                relay.to(next_one.url)
                done = running.end()
    assert (done.code, done.out) == (0, "it is short\n"), done
    assert [line for line in done.lines if "resumed in bubblewrap" in line]


def _records(server: Served, native: Any) -> list[dict[str, Any]]:
    queries = native.get("/v1/queries").json()["queries"]
    return server.airlock.records(queries[0]["id"]) if queries else []


def test_it_is_shown_live_on_a_terminal(client: Airlock):
    with served(client, script=SCRIPT + "delay_s: 0.5\n") as server:
        let_in(server)
        master, slave = pty.openpty()
        client.env |= {"TERM": "xterm", "COLUMNS": "120"}
        with client.started("run", "q", "--context", "context.txt", "--server", server.url, stderr=slave) as running:
            os.close(slave)
            seen = ""
            while data := _read(master):
                seen += data
            done, _ = running.process.communicate(timeout=60)
        os.close(master)
    assert done == b"it is short\n"
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "print(len(context))" in seen
    assert "turn 2 of 30" in seen
    assert "1 sub-call, 0 calls in flight" in seen


def _read(master: int) -> str:
    try:
        return os.read(master, 65536).decode("utf-8", "replace")
    except OSError:  # EIO: the other end is closed
        return ""
