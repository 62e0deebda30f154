"""Bad input: one clear line on standard error, nothing on standard output, exit code 2, nothing started."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import Airlock

SCRIPT = "root: ['FINAL(42)']\n"


def refused(airlock: Airlock, *arguments: object, stdin: bytes | None = None) -> str:
    """What it says; the whole of standard error is that one line."""
    done = airlock(*arguments, stdin=stdin, code=2)
    assert done.out == ""
    assert len(done.lines) == 1, done.err
    return done.said


def run(airlock: Airlock, context: object, *arguments: object, question: str = "What?") -> list[object]:
    model = f"scripted:{airlock.file('script.yaml', SCRIPT)}"
    return ["run", question, "--context", context, "--model", model, *arguments]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file or folder"),
        (b"", "is empty"),
        (b"\x7fELF\x02\x00\x00binary", "looks binary (NUL byte at offset 5)"),
        (b"twelve bytes\xff and more", "is not UTF-8 at byte 12"),
        (b"cut in a character: \xe2\x82", "is not UTF-8 at byte 20"),
    ],
    ids=["missing", "empty", "binary", "not-utf-8", "cut-off"],
)
def test_a_context_that_cannot_be_read(airlock: Airlock, content: bytes | None, says: str) -> None:
    path = airlock.folder / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    said = refused(airlock, *run(airlock, path))
    assert said.startswith(f"{path}: ")
    assert says in said
    assert "latin-1" in said or "UTF-8" not in said  # what to do about it


def test_other_contexts_that_cannot_be_read(airlock: Airlock) -> None:
    os.mkfifo(airlock.folder / "pipe")
    (airlock.folder / "folder").mkdir()
    assert "standard input" in refused(airlock, *run(airlock, airlock.folder / "pipe"))
    assert "holds no readable text" in refused(airlock, *run(airlock, airlock.folder / "folder"))
    assert "line 2 is not valid JSON" in refused(
        airlock, *run(airlock, airlock.file("bad.jsonl", '{"a": 1}\n{"a": \n'))
    )
    assert "is not valid JSON at byte" in refused(airlock, *run(airlock, airlock.file("bad.json", '{"a": [1, 2}')))
    assert "standard input: is empty" in refused(airlock, *run(airlock, "-"), stdin=b"")
    assert "standard input: is not UTF-8 at byte 3" in refused(airlock, *run(airlock, "-"), stdin=b"abc\xe9")


@pytest.mark.parametrize(("encoding", "seen"), [("latin-1", "caf\xe9!"), ("replace", "caf\ufffd!")])
def test_an_encoding_is_taken_when_asked_for(airlock: Airlock, encoding: str, seen: str) -> None:
    cell = airlock.file("cell.py", "print(ascii(context))")
    context = airlock.file("latin.txt", b"caf\xe9!")
    assert airlock("exec", cell, "--context", context, "--encoding", encoding, code=0).out == ascii(seen) + "\n"


@pytest.mark.parametrize("question", ["", "  \n\t"])
def test_an_empty_question(airlock: Airlock, question: str) -> None:
    assert "the question is empty" in refused(airlock, *run(airlock, "context.txt", question=question))


def test_no_model_is_configured(airlock: Airlock) -> None:
    done = airlock("run", "What?", "--context", "context.txt", code=2)
    assert done.out == ""
    first, *choices = done.lines
    assert first == "airlock: no model is configured. The choices are:"
    assert [line.split()[:2] for line in choices] == [
        ["--model", "local:qwen2.5-coder-1.5b"],
        ["--model", "NAME"],
    ]


def test_models_that_are_not_there(airlock: Airlock) -> None:
    def asked(model: str, *more: object) -> str:
        return refused(airlock, "run", "What?", "--context", "context.txt", "--model", model, *more)

    assert "there is no API key for gpt-5-mini: set OPENAI_API_KEY" in asked("gpt-5-mini")
    assert "set NOT_SET" in asked("mine", "--base-url", "http://127.0.0.1:9", "--api-key-env", "NOT_SET")
    assert "cannot read the script" in asked("scripted:nowhere.yaml")
    assert "is not a script" in asked(f"scripted:{airlock.file('no.yaml', 'roots: [1]')}")


def test_a_local_model_that_is_not_there(airlock: Airlock) -> None:
    """Told before anything is opened, also where it is the sub-model's name and for `exec`."""

    def asked(model: object) -> str:
        cell = airlock.file("cell.py", "pass")
        sub = run(airlock, "context.txt", "--sub-model", f"local:{model}")
        alone = refused(airlock, "exec", cell, "--context", "context.txt", "--model", f"local:{model}")
        root = refused(airlock, "run", "What?", "--context", "context.txt", "--model", f"local:{model}")
        assert alone == root == refused(airlock, *sub)
        return root

    assert asked("nothing").startswith("there is no local model 'nothing': `airlock models list` says")
    assert "fetch it with `airlock models pull qwen2.5-coder-1.5b`" in asked("qwen2.5-coder-1.5b")
    assert "nowhere.gguf: no such file; name a GGUF file" in asked(airlock.folder / "nowhere.gguf")
    assert "is not a GGUF file" in asked(airlock.file("text.gguf", "text"))
    assert "it is a folder" in asked(airlock.folder)
    assert airlock.rows("SELECT id FROM queries") == []


POLICY_FAULTS = [
    ("  query: 1 USD\n", "  query: 1 USD\n  quarry: 2 USD\n", 12, "money.quarry: is not a key of policies"),
    ("  idle: 3 min\n", "  idle: 3 parsecs\n", 18, "time.idle: needs a number and a unit out of ms, s, min, h"),
    ("  memory: 1 GiB\n", "  memory: 1024\n", 32, "sandbox.memory: needs a number and a unit"),
    ("  cell: 5 min\n", "", 15, "time.cell: is missing"),
    ("  cell: 5 min\n", "  cell: 0 s\n", 17, "time.cell: "),
    ('  root: ["*"]\n', "  root: []\n", 3, "models.root"),
    ("  depth: 1\n", "  depth: 1\n  depth: 0\n", 24, "depth: is there twice"),
    ("tenant:\n", "tenant: [\n", 33, "not YAML"),
]


@pytest.mark.parametrize(("there", "instead", "line", "says"), POLICY_FAULTS)
def test_a_policy_fault_is_told_with_its_line(airlock: Airlock, there: str, instead: str, line: int, says: str) -> None:
    good = airlock.policy()
    assert there in good.read_text()
    bad = airlock.file("bad.yaml", good.read_text().replace(there, instead, 1))
    said = refused(airlock, "policy", "check", bad)
    assert said.startswith(f"bad.yaml:{line}: {says}" if "YAML" not in says else "bad.yaml:")
    assert says in said


def test_a_run_is_refused_with_a_bad_policy(airlock: Airlock) -> None:
    bad = airlock.file("bad.yaml", airlock.policy().read_text() + "extra: 1\n")
    assert "bad.yaml:51: extra: is not a key" in refused(airlock, *run(airlock, "context.txt", "--policy", bad))
    assert "default, development, strict" in refused(airlock, *run(airlock, "context.txt", "--policy", "lenient"))
    # A request narrows its policy and never widens it.
    assert "permits a depth of 1" in refused(airlock, *run(airlock, "context.txt", "--depth", 2))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--budget", "-1", "is not an amount in USD"),
        ("--budget", "lots", "is not an amount in USD"),
        ("--budget", "nan", "is not an amount in USD"),
        ("--budget", "1e30", "is not an amount in USD"),
        ("--timeout", "0", "is not a number of seconds from 0.001 to 1,000,000"),
        ("--timeout", "inf", "is not a number of seconds"),
        ("--timeout", "soon", "'soon' is not a number of seconds"),
        ("--depth", "-1", "-1 is not a whole number from 0 up"),
        ("--depth", "0.5", "'0.5' is not a whole number from 0 up"),
        ("--price", "mine=1", "MODEL=IN,OUT"),
        ("--price", "mine=1,-1", "MODEL=IN,OUT"),
        ("--backend", "chroot", "there is no backend 'chroot'"),
        ("--encoding", "utf-7", "utf-7"),
        ("--no-such-option", "1", "--no-such-option"),
    ],
)
def test_an_option_that_makes_no_sense(airlock: Airlock, option: str, value: str, says: str) -> None:
    assert says in refused(airlock, *run(airlock, "context.txt", option, value))


def test_a_model_without_a_price_is_refused_before_it_is_asked(airlock: Airlock) -> None:
    options = ["--model", "nobody/knows", "--base-url", "http://127.0.0.1:9/v1"]
    said = refused(airlock, "run", "What?", "--context", "context.txt", *options)
    assert "the price of model 'nobody/knows' is not known" in said
    assert "--price nobody/knows=IN,OUT" in said
    assert airlock.rows("SELECT id FROM queries") == []


def test_answer_schemas_that_are_none(airlock: Airlock) -> None:
    def asked(schema: Path) -> str:
        return refused(airlock, *run(airlock, "context.txt", "--answer-schema", schema))

    assert "cannot read the answer schema" in asked(airlock.folder / "nowhere.json")
    assert "cannot read the answer schema" in asked(airlock.file("text.json", "not JSON"))
    assert "is not a JSON Schema" in asked(airlock.file("type.json", '{"type": "strung"}'))


def test_a_file_to_run_that_cannot_be_read(airlock: Airlock) -> None:
    assert "no such file" in refused(airlock, "exec", "nowhere.py", "--context", "context.txt").lower()
    assert "not UTF-8" in refused(airlock, "exec", airlock.file("bad.py", b"\xff"), "--context", "context.txt")


def test_pipes_and_devices_where_a_file_is_asked_for(airlock: Airlock) -> None:
    """To open a pipe that nobody writes to takes for ever."""
    pipe = airlock.folder / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        for arguments in (
            ["exec", path, "--context", "context.txt"],
            ["run", "What?", "--context", "context.txt", "--model", f"scripted:{path}"],
            ["run", "What?", "--context", "context.txt", "--model", f"local:{path}"],
            run(airlock, "context.txt", "--policy", path),
            run(airlock, "context.txt", "--answer-schema", path),
            ["policy", "check", path],
            run(airlock, path),
        ):
            said = refused(airlock, *arguments)
            assert "it is not a regular file" in said or "is neither a file nor a folder" in said
    os.mkfifo(airlock.home / "airlock.toml")
    assert "airlock.toml: it is not a regular file" in refused(airlock, *run(airlock, "context.txt"))


def test_a_configuration_that_is_wrong(airlock: Airlock) -> None:
    airlock.file("home/airlock.toml", "modle = 'x'\n")
    assert "airlock.toml: modle: " in refused(airlock, *run(airlock, "context.txt"))
    airlock.file("home/airlock.toml", "model = \n")
    assert "airlock.toml: not TOML" in refused(airlock, *run(airlock, "context.txt"))
    (airlock.home / "airlock.toml").unlink()


def test_a_command_that_lacks_something(airlock: Airlock) -> None:
    assert refused(airlock, "run", "--context", "context.txt").endswith("'QUESTION'. See `airlock run --help`.")
    assert refused(airlock, "run", "What?", "more", "--context", "x").endswith("(more) See `airlock run --help`.")
    assert "See `airlock --help`." in refused(airlock, "rnu")
    for command in ((), ("policy",)):
        done = airlock(*command, code=2)
        assert done.out == ""
        assert done.err.startswith("Usage: airlock ")


def test_a_program_that_no_frame_carries(airlock: Airlock) -> None:
    cell = airlock.file("large.py", "x = '" + "\u00e9" * 4_000_000 + "'")
    assert "larger than a sandbox takes (16 MiB, as JSON)" in refused(airlock, "exec", cell)
    assert airlock.rows("SELECT id FROM queries") == []


@pytest.mark.parametrize("url", ["127.0.0.1:9", "ftp://host", "/path", "host/v1"])
def test_a_server_that_has_no_address(airlock: Airlock, url: str) -> None:
    options = ["--context", "context.txt", "--model", "mine", "--base-url", url, "--price", "mine=0,0"]
    assert "has to be an address with http:// or https://" in refused(airlock, "run", "What?", *options)


def test_a_data_folder_that_is_none(airlock: Airlock) -> None:
    nowhere = replace(airlock, home=airlock.file("file", ""))
    for command in (["exec", airlock.file("cell.py", "pass")], ["models", "pull"]):
        assert "Not a directory" in nowhere(*command, code=4).said


def test_an_empty_context_path_is_not_the_current_folder(airlock: Airlock) -> None:
    done = airlock("exec", airlock.file("cell.py", "pass"), "--context", "", code=2)
    assert done.said == "--context is empty: name a file, a folder, or - for standard input"


def test_a_time_that_is_no_number(airlock: Airlock) -> None:
    done = airlock("exec", airlock.file("cell.py", "pass"), "--context", "context.txt", "--timeout", "nan", code=2)
    assert "not a number of seconds" in done.said


def test_a_program_with_a_byte_order_mark(airlock: Airlock) -> None:
    cell = airlock.file("cell.py", b"\xef\xbb\xbfprint('ran')")
    assert airlock("exec", cell, "--context", "context.txt", code=0).out == "ran\n"


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_standard_stream(airlock: Airlock, closed: str) -> None:
    cell = airlock.file("cell.py", "FINAL('done')")
    shell = replace(airlock, prefix=["sh", "-c", f'exec "$0" "$@" {closed}'])
    done = shell("exec", cell, "--context", "context.txt", code=0)
    assert done.err == ""
    assert done.out == ("" if "1>&-" in closed else "done\n")
