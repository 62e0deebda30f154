"""`doctor`, `models`, `policy` and `audit show`."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing

import yaml

from orchestrator.named_policy import load_policy
from orchestrator.sandbox.agent import agent_version
from orchestrator.sandbox.conformance import PROMISES
from tests.command import Airlock
from tests.fakes.engine import fake_engine

SCRIPT = r"""
root:
  - "```repl\nprint('seen by the root', llm_query('What is it?'))\n```"
  - "FINAL(the answer itself)"
sub:
  - {match: "What", reply: "said by the sub-model"}
"""


def run(airlock: Airlock, *more: object) -> str:
    """A query with one of everything; its id."""
    script = airlock.file("script.yaml", SCRIPT)
    options = ["--context", "context.txt", "--model", f"scripted:{script}", "--json", *more]
    return str(airlock("run", "the question itself", *options, code=0).json["query_id"])


def test_doctor_of_every_backend(airlock: Airlock) -> None:
    """No image is built here, so the containers are not to be had; what they are with one, test_containers says."""
    (airlock.home / "slots" / "slot-4000").mkdir(parents=True)
    done = airlock("doctor", code=0)
    assert done.lines == ["usable: bubblewrap"]
    lines = done.out.splitlines()
    found = {(line[:6].strip(), line[8:19].strip()): line[19:] for line in lines if line.startswith("  ")}
    assert found["ok", "system"].startswith("Python 3.")
    assert found["ok", "store"].startswith(str(airlock.home))
    assert found["ok", "leftovers"] == "removed what 1 dead sandboxes had left"
    assert found["ok", "bwrap"].startswith("bubblewrap 0.")
    assert found["ok", "promises"] == f"{len(PROMISES)} of {len(PROMISES)} kept"
    assert found["ok", "kernel"] == "CVE-2026-31431 needs a socket of AF_ALG, which a guest cannot make"
    assert re.fullmatch(
        r"Python 3\.[\d.]+, first cell after \d+ ms, round trip [\d.]+ ms \(p50 of 50\)", found["ok", "sandbox"]
    )
    assert [line for line in lines if not line.startswith(" ")] == [
        "machine",
        "bubblewrap: usable, isolation namespace",
        "docker: not usable",
        "gvisor: not usable",
        "kata: not usable",
    ]
    assert lines.count("  FAIL  engine     the sandbox's image is not built: run `airlock images build`") == 3


def test_doctor_in_json(airlock: Airlock) -> None:
    report = airlock("doctor", "--backend", "bubblewrap", "--json", code=0).json
    assert report["usable"] is True
    assert [finding["name"] for finding in report["findings"]] == ["system", "store", "leftovers", "models"]
    (backend,) = report["backends"]
    assert (backend["name"], backend["isolation"], backend["usable"]) == ("bubblewrap", "namespace", True)
    assert all(list(finding) == ["name", "ok", "needed", "text"] for finding in backend["findings"])
    assert backend["promises"] == backend["kept"] == len(PROMISES)
    assert (backend["deviations"], backend["broken"]) == ({}, {})
    assert 0 < backend["round_trip_p50_ms"] < backend["first_cell_ms"]


def test_doctor_of_what_is_not_there(airlock: Airlock) -> None:
    assert airlock("doctor", "--backend", "none", code=2).said.startswith("there is no backend 'none'")
    done = airlock("doctor", "--backend", "docker", code=4)
    assert done.lines == ["not usable"]
    assert "docker: not usable\n  FAIL  engine     the sandbox's image is not built" in done.out
    report = airlock("doctor", "--backend", "gvisor", "--json", code=4).json
    assert (report["usable"], report["backends"][0]["usable"]) == (False, False)


def test_doctor_of_a_runc_that_lets_guests_out(airlock: Airlock) -> None:
    record = {"python": {"id": "sha256:" + "0" * 64, "agent": agent_version()}}
    (airlock.home / "images.json").write_text(json.dumps(record))
    with fake_engine(airlock.folder / "docker.sock", runc="1.1.11") as named:
        airlock.env["DOCKER_HOST"] = named
        doctor = airlock("doctor", "--backend", "docker", code=4)
        assert "FAIL  engine     runc 1.1.11 lets guests out (CVE-2024-21626)" in doctor.out
        cell = airlock.file("cell.py", "print(1)")
        done = airlock("exec", cell, "--context", "context.txt", "--backend", "docker", code=4)
    assert "killed: sandbox-unusable: runc 1.1.11 lets guests out (CVE-2024-21626): install 1.1.12" in done.said


def test_models_list(airlock: Airlock) -> None:
    rows = [line.split("\t") for line in airlock("models", "list", code=0).out.splitlines()]
    assert rows == [["qwen2.5-coder-1.5b", "1,066 MiB", "not here: airlock models pull qwen2.5-coder-1.5b"]]
    path = airlock.file("home/models/mine.gguf", "GGUF")
    rows = [line.split("\t") for line in airlock("models", "list", code=0).out.splitlines()]
    assert rows[0] == ["local:mine", "0 MiB", str(path)]
    assert "there is no model 'other' to pull" in airlock("models", "pull", "other", code=2).said


def test_policy_show_prints_the_policy_in_force(airlock: Airlock) -> None:
    for name in ("default", "strict", "development"):
        first, text = airlock("policy", "show", "--policy", name, code=0).out.split("\n", 1)
        assert first == f"# {name}, SHA-256 {load_policy(name).sha256()}"
        assert yaml.safe_load(text) == load_policy(name).model_dump(mode="json")


def test_policy_check_accepts_what_is_valid(airlock: Airlock) -> None:
    path = airlock.policy("strict", money_query="0.1 USD")
    done = airlock("policy", "check", path, code=0)
    assert done.out == f"{path}: valid, SHA-256 {load_policy(str(path)).sha256()}\n"


def test_the_policy_in_force_is_in_every_record(airlock: Airlock) -> None:
    path = airlock.policy()
    run(airlock, "--policy", path)
    assert {record["policy"] for record in airlock.records()} == {load_policy(str(path)).sha256()}
    run(airlock, "--policy", path, "--budget", "0.5")  # narrowed, and so another one
    assert {record["policy"] for record in airlock.records()}.isdisjoint({load_policy(str(path)).sha256()})
    assert json.loads(airlock.history()[0].payloads["policy"])["money"]["query"] == "0.50 USD"


def test_audit_show_reads_like_a_run(airlock: Airlock) -> None:
    query = run(airlock)
    shown = airlock("audit", "show", query, code=0).out
    places = [
        shown.index(text)
        for text in (
            f"query {query} of tenant default",
            "question: the question itself",
            "text, 33 characters",
            "sandbox started",
            "turn root.c1",
            "| print('seen by the root'",
            "sub-call root.c2",
            "> What is it?",
            "< said by the sub-model",
            "seen by the root said by the sub-model",
            "turn root.c3",
            "sandbox ended",
            "context unchanged",
            "closed: answered; cost 0.00 USD",
            "the answer itself",
        )
    ]
    assert places[:-1] == sorted(places[:-1])
    assert shown.splitlines()[-1].endswith("the chain is whole")
    assert airlock("audit", "show", "last", code=0).out == shown
    assert airlock("audit", "show", code=0).out == shown
    assert airlock("audit", "show", query[:20], code=0).out == shown


def test_audit_show_of_an_unclear_name(airlock: Airlock) -> None:
    first, second = run(airlock), run(airlock)
    said = airlock("audit", "show", first[:8], code=2).said
    assert said.startswith(f"several queries begin with '{first[:8]}', the newest of them: ")
    assert first in said
    assert second in said
    assert "there is no query '99'" in airlock("audit", "show", "99", code=2).said
    assert "there is no query '%'" in airlock("audit", "show", "%", code=2).said  # not a pattern


def test_audit_show_of_a_single_cell(airlock: Airlock) -> None:
    airlock("exec", airlock.file("cell.py", "FINAL(42)"), code=0)
    shown = airlock("audit", "show", code=0).out
    assert "model:    none, a single cell; sub-calls: none" in shown
    assert "question:" not in shown


def test_audit_show_without_a_journal(airlock: Airlock) -> None:
    airlock.home = airlock.folder / "nowhere"
    assert "there is no journal in" in airlock("audit", "show", code=2).said
    assert not airlock.home.exists()


def test_under_the_strict_policy_no_payload_is_kept(airlock: Airlock) -> None:
    run(airlock, "--policy", airlock.policy("strict", sandbox_least_isolation="namespace"))
    assert airlock.rows("SELECT count(*) FROM payloads") == [(0,)]
    shown = airlock("audit", "show", code=0).out
    assert "question: (not kept: 19 bytes)" in shown
    assert "the chain is whole" in shown
    kept = b"".join(path.read_bytes() for path in airlock.home.glob("airlock.db*"))
    for text in (b"the question itself", b"seen by the root", b"said by the sub-model", b"the answer itself"):
        assert text not in kept
        assert text.decode() not in shown


def test_a_changed_journal_does_not_pass(airlock: Airlock) -> None:
    run(airlock)
    whole = (airlock.home / "airlock.db").read_bytes()
    changes = [
        "UPDATE records SET record=replace(record, 'default', 'another') WHERE log LIKE 'tenants/%' AND seq=2",
        "DELETE FROM records WHERE log LIKE 'tenants/%' AND seq=3",
        "UPDATE payloads SET sealed=x'00112233' WHERE name='answer'",
    ]
    for change in changes:
        with closing(sqlite3.connect(airlock.home / "airlock.db")) as db, db:
            assert db.execute(change).rowcount == 1
        done = airlock("audit", "show", code=4)
        assert "BROKEN: " in done.out.splitlines()[-1]
        (airlock.home / "airlock.db").write_bytes(whole)
    airlock("audit", "show", code=0)


def test_a_journal_of_hostile_text_is_shown_in_json_safe_records(airlock: Airlock) -> None:
    code = "print('\\ud800 \\x00 \\x1b[0m ' + chr(0x202e))"
    airlock("exec", airlock.file("cell.py", code), "--context", "context.txt", code=0)
    assert json.dumps(airlock.records()).isascii()
    airlock("audit", "show", code=0)


def test_the_lock_of_the_image_names_packages_with_their_hashes(airlock: Airlock) -> None:
    lines = airlock("images", "lock", code=0).out.splitlines()
    assert [line for line in lines if line.startswith("[")] == ["[python]", "[data]"]
    packages = [line.split() for line in lines if not line.startswith(("#", "["))]
    assert {"libc6", "python3.11-minimal", "python3-pandas"} <= {package[0] for package in packages}
    assert all(len(package) == 4 and len(package[3]) == 64 for package in packages)


def test_a_command_keeps_no_sandboxes_ready(airlock: Airlock) -> None:
    """A pool is for who asks again; its sandboxes would be started for nothing."""
    airlock.file("home/airlock.toml", "[pool]\nsize = {bubblewrap = 3}\n")
    cell = airlock.file("cell.py", "print('ready', flush=True)\nwhile True: pass")
    with airlock.started("exec", cell) as query:
        assert query.line() == "ready\n"
        assert len(list(airlock.home.glob("slots/slot-*"))) == 1
        assert query.interrupt().code == 130
