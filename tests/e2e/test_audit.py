"""`airlock audit` as people use it, on the journals of real queries."""

from __future__ import annotations

import json
import re
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.command import Airlock
from tests.e2e.test_output import scripted
from tests.third_party import check_export

VERDICTS = ["integrity", "append-only", "completeness", "payloads", "freshness"]


@pytest.fixture
def asked(airlock: Airlock) -> Airlock:
    """Two queries."""
    for number in range(2):
        done = airlock("run", "What is the magic number?", *scripted(airlock), "--json", code=0)
        airlock.file(f"checkpoint{number}", done.json["checkpoint"])
    return airlock


def query_of(airlock: Airlock) -> str:
    return airlock.rows("SELECT id FROM queries ORDER BY opened_at DESC LIMIT 1")[0][0]


def test_a_journal_is_verified_against_what_its_callers_hold(asked: Airlock) -> None:
    held = ["--checkpoint", asked.folder / "checkpoint0", "--checkpoint", asked.folder / "checkpoint1"]
    done = asked("audit", "verify", *held, code=0)
    assert [line.split()[:2] for line in done.out.splitlines()] == [[name, "holds"] for name in VERDICTS]
    key = asked("audit", "key", code=0).out.strip()
    report = asked("audit", "verify", *held, "--key", key, "--json", code=0).json
    assert list(report) == VERDICTS
    assert all(verdict["holds"] and verdict["faults"] == [] for verdict in report.values())


def test_a_journal_that_was_changed_fails_with_one_line_a_fault(asked: Airlock) -> None:
    database = asked.home / "airlock.db"
    whole = database.read_bytes()
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE records SET record=replace(record, 'root', 'boot') WHERE seq=5 AND log LIKE 'tenants/%'")
    done = asked("audit", "verify", code=1)
    assert done.out.startswith("integrity     FAILS")
    assert "does not match its hash" in done.out
    assert asked("audit", "verify", "--json", code=1).json["integrity"]["holds"] is False
    database.write_bytes(whole)
    asked("audit", "verify", code=0)


def test_a_third_party_verifies_an_export_by_its_format_alone(asked: Airlock) -> None:
    asked("audit", "erase", "last", "--record", "2", "--why", "the tenant asked", code=0)
    tar = asked.folder / "all.tar"
    asked("audit", "export", "--out", tar, code=0)
    count = check_export(tar)
    assert count == asked.rows("SELECT count(*) FROM records")[0][0]
    done = asked("audit", "verify", tar, "--checkpoint", asked.folder / "checkpoint0", code=0)
    assert f"{count} records" in done.out
    content = tar.read_bytes().replace(b'"status":"answered"', b'"status":"rejected"')
    assert content != tar.read_bytes()
    tar.write_bytes(content)
    with pytest.raises(AssertionError):
        check_export(tar)
    asked("audit", "verify", tar, code=1)


def test_one_query_is_exported_with_nothing_of_others(asked: Airlock) -> None:
    query = query_of(asked)
    (other,) = {name for (name,) in asked.rows("SELECT id FROM queries")} - {query}
    tar = asked.folder / "one.tar"
    asked("audit", "export", query, "--out", tar, code=0)
    asked("audit", "verify", tar, "--checkpoint", asked.folder / "checkpoint1", code=0)
    assert other.encode() not in tar.read_bytes()
    with tarfile.open(tar) as opened:
        names = opened.getnames()
    assert f"payloads/{query}/0/question" in names
    assert not any("platform" in name for name in names)


def test_a_single_record_is_proved(asked: Airlock) -> None:
    query, key = query_of(asked), asked("audit", "key", code=0).out.strip()
    proof = asked.file("event.tlog-proof", asked("audit", "prove", query, "3", code=0).out)
    shown = asked("audit", "verify", proof, "--key", key, code=0)
    assert json.loads(shown.out) == asked.records(query)[3]
    asked.file("event.tlog-proof", re.sub(r"index \d+", "index 1", proof.read_text()))
    assert "proves nothing" in asked("audit", "verify", proof, "--key", key, code=2).said
    assert "give --key" in asked("audit", "verify", proof, code=2).said
    assert "has no record 99" in asked("audit", "prove", query, "99", code=2).said


def test_what_is_erased_is_nowhere_on_the_disk(asked: Airlock) -> None:
    query = query_of(asked)
    sealed = [row[0] for row in asked.rows("SELECT sealed FROM payloads WHERE query=?", query)]
    assert "payloads erased" in asked("audit", "erase", query, code=0).err
    for file in asked.home.glob("airlock.db*"):
        content = file.read_bytes()
        assert not any(blob[-40:] in content for blob in sealed), file
    done = asked("audit", "verify", code=0)
    assert f"{len(sealed)} erased" in done.out
    assert "(not kept" in asked("audit", "show", query, code=0).out
    assert "0 payloads" in asked("audit", "erase", query, code=0).err
    assert asked.rows("SELECT count(*) FROM records WHERE query='tenants/default'") == [(2,)]


def test_what_cannot_be_signed_is_not_erased_and_not_scored(asked: Airlock) -> None:
    """It is one transaction: a log that does not go on from what was signed has nothing added to it."""
    query, database = query_of(asked), asked.home / "airlock.db"
    whole = database.read_bytes()
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE records SET hash=? WHERE query=? AND seq=1", ("0" * 64, query))
    before = asked.rows("SELECT count(*) FROM records"), asked.rows("SELECT count(*) FROM payloads")
    for command in (["erase", query], ["score", query, "1"]):
        assert "is not the one that was signed" in asked("audit", *command, code=4).said
        assert before == (asked.rows("SELECT count(*) FROM records"), asked.rows("SELECT count(*) FROM payloads"))
    database.write_bytes(whole)


def test_exports_in_the_formats_of_others(asked: Airlock) -> None:
    asked("audit", "score", "last", "0.9", "--by", "me", code=0)
    for name in ("otlp", "ocsf", "chat"):
        out = asked.folder / name
        asked("audit", "export", "--out", out, "--format", name, code=0)
        assert all(json.loads(line) for line in out.read_text().splitlines())
    asked("audit", "export", "last", "--out", asked.folder / "rlms", "--format", "rlms", code=0)
    chosen = ("audit", "export", "--format", "chat", "--status", "answered", "--least-score", "0.8")
    asked(*chosen, "--out", asked.folder / "good", code=0)
    lines = [json.loads(line) for line in (asked.folder / "good").read_text().splitlines()]
    assert {line["query"] for line in lines} == {query_of(asked)}
    asked("audit", "verify", code=0)


def test_a_query_is_followed_to_its_end(asked: Airlock) -> None:
    shown = asked("audit", "follow", code=0)
    assert shown.out.splitlines()[-2:] == ["answer:", "      4711"]
    rows = [json.loads(line) for line in asked("audit", "follow", "--json", code=0).out.splitlines()]
    assert [row["seq"] for row in rows] == list(range(len(asked.records())))
    assert rows[-1]["payloads"] == {"answer": "4711"}


def test_checkpoints_are_anchored_and_held_against_the_journal(asked: Airlock) -> None:
    place = f"file:{asked.folder}/anchors"
    assert "cannot" in asked("audit", "anchor", place, code=4).said
    (asked.folder / "anchors").mkdir()
    done = asked("audit", "anchor", place, code=0)
    assert [line.split()[0] for line in done.lines] == ["tenants/default", "platform"]
    asked.file("home/airlock.toml", f'[audit]\nanchors = ["{place}"]\n').rename(asked.home / "airlock.toml")
    asked("audit", "anchor", code=0)
    assert "2 checkpoints that you hold" in asked("audit", "verify", "--anchor", place, code=0).out
    anchored = [body for (body,) in asked.rows("SELECT record FROM records WHERE query='platform'")]
    assert sum(b"log.anchored" in record for record in anchored) == 4
    whole = {path: path.read_bytes() for path in asked.home.glob("heads/*")}
    database = asked.home / "airlock.db"
    content = database.read_bytes()
    for path in whole:
        path.unlink()
    with closing(sqlite3.connect(database)) as db, db:
        for table in ("records", "checkpoints", "tiles", "queries", "payloads", "reservations", "scopes"):
            db.execute(f"DELETE FROM {table}")  # noqa: S608
    asked("run", "What is the magic number?", *scripted(asked), code=0)  # under the same key, as if nothing had been
    asked("audit", "verify", code=0)
    failed = asked("audit", "verify", "--anchor", place, code=1)
    assert "append-only   FAILS" in failed.out
    database.write_bytes(content)
    for path, old in whole.items():
        path.write_bytes(old)


def test_no_secret_gets_into_the_journal(asked: Airlock) -> None:
    key = "sk-proj-" + "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cD1fG3iJ5kL7"
    asked.env["OPENAI_API_KEY"] = "the-key-of-this-process"
    code = f"print('Authorization: Bearer {key}', 'the-key-of-this-process'); raise ValueError('{key}')"
    asked("exec", asked.file("cell.py", code), "--context", "context.txt", code=1)
    shown = asked("audit", "show", code=0).out
    assert "[redacted: " in shown
    assert key not in shown
    assert "the-key-of-this-process" not in shown
    assert any(payload.get("redacted") for record in asked.records() for payload in record["payloads"].values())
    assert key not in json.dumps(asked.records())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "no-such.tar"], "no such file"),
        (["verify", "context.txt"], "is not an export"),
        (["verify", "--checkpoint", "no-such"], "cannot read a checkpoint"),
        (["verify", "--key", "nonsense"], "--key: a verifier's key is NAME+ID+KEY"),
        (["export"], "say where it goes"),
        (["export", "--out", "no/such/folder/x.tar"], "cannot write"),
        (["export", "nothing", "--out", "x.tar"], "there is no query 'nothing'"),
        (["export", "--out", "x", "--format", "ocsf", "--status", "answered"], "--format chat"),
        (["erase", "nothing"], "there is no query"),
        (["erase", "last", "--payload", "prompt"], "give its number with --record"),
        (["erase", "last", "--record", "9" * 20], "is not in the range 0<=x<=2147483647"),
        (["erase", "last", "--record", "1", "--payload", "x" * 20_000], "asked, order; not 'xxxxxxxx"),
        (["prove", "last", "9" * 20], "is not in the range 0<=x<=2147483647"),
        (["prove", "last", "2147483647"], "has no record 2147483647"),
        (["score", "last", "2"], "not a number from 0 to 1"),
        (["score", "last", "nan"], "not a number from 0 to 1"),
        (["prove", "last", "one"], "'one' is not a valid integer range"),
        (["follow", "nothing"], "there is no query"),
        (["anchor"], "say where checkpoints are to be put"),
        (["anchor", "ftp://x"], "is not an address of an anchor"),
        (["verify", "--anchor", "x"], "is not an address of an anchor"),
    ],
)
def test_wrong_use_is_one_line(asked: Airlock, arguments: list[str], said: str) -> None:
    before = {path.name for path in asked.folder.iterdir()}
    done = asked("audit", *arguments, code=2)
    assert said.lower() in done.said.lower()
    assert {path.name for path in asked.folder.iterdir()} == before


def test_a_data_folder_without_its_master_key_is_refused(asked: Airlock) -> None:
    key = asked.home / "master.key"
    content = key.read_text()
    key.unlink()
    assert "the master key of this database is not here" in asked("audit", "verify", code=4).said
    assert "the master key of this database is not here" in asked("run", "x", *scripted(asked), code=4).said
    key.write_text("A" * 43 + "=\n")
    assert "does not open with the master key" in asked("run", "x", *scripted(asked), code=4).said
    key.write_text("nonsense")
    assert "is no master key" in asked("run", "x", *scripted(asked), code=2).said
    key.unlink()
    asked.env["AIRLOCK_MASTER_KEY"] = content.strip()
    asked("audit", "verify", code=0)
    assert not key.exists()


def test_a_journal_from_a_backup_is_not_gone_on_with(asked: Airlock, tmp_path: Path) -> None:
    database = asked.home / "airlock.db"
    backup = database.read_bytes()
    asked("run", "What is the magic number?", *scripted(asked), code=0)
    newest = database.read_bytes()
    database.write_bytes(backup)
    done = asked("run", "What is the magic number?", *scripted(asked), code=4)
    assert "the database is an older one, or was cut; nothing is added to it" in done.said
    assert len(asked.rows("SELECT id FROM queries")) == 2, "it was refused before it was begun"
    database.write_bytes(newest)
    asked("run", "What is the magic number?", *scripted(asked), code=0)
