"""Providers that say no, fail, hang or lie: what it costs, what is said, and how the command ends."""

from __future__ import annotations

import socket
import textwrap
import time
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest

from orchestrator.lm.replies import BYTES_A_TOKEN
from tests.command import Airlock, Done
from tests.fakes.provider import (
    Behaviour,
    Cut,
    Dies,
    Drip,
    Endless,
    Fail,
    Hang,
    HangUp,
    Provider,
    Raw,
    Refuses,
    Say,
    completion,
)

DONE = Say("FINAL(42)")
SECRET = "sk-very-secret-0123456789"  # noqa: S105  of no account
PRICED = ("--price", "mine=1,2")


def ask(airlock: Airlock, url: str, *more: object, policy: Any = None) -> Done:
    airlock.env["MY_KEY"] = SECRET
    options = ["--context", "context.txt", "--model", "mine", "--base-url", url, "--api-key-env", "MY_KEY", *PRICED]
    # One second of patience, and two retries, are enough to see all there is to see.
    policy = policy or airlock.policy(time_idle="1 s", counts_retries="2")
    done = airlock("run", "What is the magic number?", *options, "--policy", policy, "--json", *more)
    assert SECRET not in done.out + done.err
    assert all(SECRET.encode() not in path.read_bytes() for path in airlock.home.rglob("*") if path.is_file())
    return done


def bounds(airlock: Airlock) -> list[Decimal]:
    return [Decimal(r["body"]["bound_usd"]) for r in airlock.records() if r["type"] == "call.intent"]


def test_an_answer(airlock: Airlock) -> None:
    with Provider(root=[DONE]) as provider:
        done = ask(airlock, provider.url)
    assert (done.code, done.json["answer"], done.json["cost_usd"]) == (0, "42", "0.00002")
    (request,) = provider.requests
    assert (request.path, request.key) == ("/v1/chat/completions", SECRET)
    assert (request.body["n"], request.body["max_tokens"]) == (1, 4096)
    assert "4711" not in str(request.body)  # the context's text stays where it is


REFUSALS = [
    (401, "refused the API key (401)"),
    (403, "refused the API key (403)"),
    (404, "has no model 'mine'"),
    (400, "refused the request (400): what a strange request"),
]


@pytest.mark.parametrize(("status", "says"), REFUSALS)
def test_it_refuses(airlock: Airlock, status: int, says: str) -> None:
    with Provider(root=[Fail(status, message="what a strange request")]) as provider:
        done = ask(airlock, provider.url)
    assert done.code == 5
    assert says in done.said
    assert done.said.startswith("failed: provider-refused: ")
    assert (done.json["status"], done.json["answer"], done.json["cost_usd"]) == ("failed", None, "0.00")
    assert len(provider.requests) == 1  # asking again would be useless


def test_its_error_repeats_the_key(airlock: Airlock) -> None:
    with Provider(root=[Fail(400, message=f"bad header: Bearer {SECRET}")]) as provider:
        done = ask(airlock, provider.url)
    assert (done.code, "Bearer ***" in done.said) == (5, True)


@pytest.mark.parametrize(
    "first",
    [
        [Fail(500)],
        [Fail(503), Fail(502)],
        [Fail(429)],
        [Fail(429, {"retry-after": "0"}), Fail(429, {"retry-after": "nonsense"})],
    ],
)
def test_it_fails_for_a_while(airlock: Airlock, first: Sequence[Behaviour]) -> None:
    with Provider(root=[*first, DONE]) as provider:
        done = ask(airlock, provider.url)
    assert (done.code, done.json["answer"], done.json["cost_usd"]) == (0, "42", "0.00002")
    assert len(provider.requests) == len(first) + 1
    outcomes = [r["body"]["outcome"] for r in airlock.records() if r["type"] == "call.result"]
    assert outcomes == ["void"] * len(first) + ["answered"]
    assert len(bounds(airlock)) == len(first) + 1  # every attempt was reserved and recorded


@pytest.mark.parametrize("status", [429, 500])
def test_it_goes_on_failing(airlock: Airlock, status: int) -> None:
    with Provider(root=[Fail(status, {"retry-after": "0"}, "come back later")]) as provider:
        done = ask(airlock, provider.url)
    assert done.code == 5
    assert f"is busy or failing ({status}): " in done.said
    assert (done.json["cost_usd"], len(provider.requests)) == ("0.00", 3)  # two retries, as the policy has it


def test_retry_after_is_honoured(airlock: Airlock) -> None:
    asked: list[float] = []

    def note(_seen: object) -> str:
        asked.append(time.monotonic())
        return "FINAL(42)"

    with Provider(root=[Fail(429, {"retry-after": "1"}), Say(note)]) as provider:
        started = time.monotonic()
        done = ask(airlock, provider.url)
    assert done.code == 0
    assert asked[0] - started > 1.0


def test_a_wait_that_would_outlast_the_query_is_not_begun(airlock: Airlock) -> None:
    with Provider(root=[Fail(429, {"retry-after": "3600"})]) as provider:
        started = time.monotonic()
        done = ask(airlock, provider.url)
    assert (done.code, len(provider.requests)) == (5, 1)
    assert time.monotonic() - started < 30


def test_nobody_takes_the_connection(airlock: Airlock) -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):  # what more comes is left to wait
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        done = ask(airlock, url, policy=airlock.policy(time_idle="1 s", counts_retries="0"))
    assert done.code == 5
    assert "provider-busy: cannot connect" in done.said
    assert done.json["cost_usd"] == "0.00"  # nothing was sent


def test_nobody_listens(airlock: Airlock) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and no listen(): connections are refused
        done = ask(airlock, f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert done.code == 5
    assert "provider-busy: cannot connect to http://127.0.0.1:" in done.said
    assert done.json["cost_usd"] == "0.00"
    assert len(bounds(airlock)) == 3


SILENCE = {"hang": Hang(), "drip": Drip(), "cut": Cut(), "hang-up": HangUp(), "not-json": Raw(b"{nonsense")}
SILENCE["dies"] = Dies("FINAL(4")


@pytest.mark.parametrize("behaviour", SILENCE.values(), ids=SILENCE)
def test_what_it_used_is_not_known(airlock: Airlock, behaviour: Behaviour) -> None:
    with Provider(root=[behaviour, DONE]) as provider:
        done = ask(airlock, provider.url)
    assert done.code == 5
    assert done.said.startswith("failed: outcome-unknown: ")
    (bound,) = bounds(airlock)
    assert Decimal(done.json["cost_usd"]) == bound > 0  # charged at the bound
    assert len(provider.requests) == 1  # and not sent again


def many(airlock: Airlock, sub: Sequence[Behaviour]) -> tuple[list[str], list[dict[str, Any]]]:
    """As many sub-calls, one after the other: what a cell sees of each, and what the journal says of it."""
    cell = f"""
        for _ in range({len(sub)}):
            try:
                print(llm_query("What?"))
            except ProviderFailed as error:
                print(error.kind)
    """
    with Provider(sub=sub) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED]
        file = airlock.file("cell.py", textwrap.dedent(cell))
        done = airlock("exec", file, "--context", "context.txt", *options, code=0)
    assert len(provider.requests) == len(sub)
    return done.out.splitlines(), [r["body"] for r in airlock.records() if r["type"] == "call.result"]


GARBAGE = [
    Raw(b"<html>It works!</html>", "text/html"),
    Raw(b'{"choices": "\xff\xfe"}'),
    Raw(b"null"),
    Raw(b"[1, 2, 3]"),
    Raw(b""),
    Raw(b"{}"),
    Raw(b'{"choices": []}'),
    Raw(b'{"choices": [null]}'),
    Raw(b'{"choices": [{"index": 0}]}'),
    Raw(b'{"choices": [{"message": {"content": {"a": 1}}}]}'),
    Raw(b'{"choices": {"message": 1}}'),
    Raw(b'{"error": {"message": "overloaded"}}'),
]


def test_it_sends_garbage(airlock: Airlock) -> None:
    seen, results = many(airlock, GARBAGE)
    assert seen == ["outcome-unknown"] * len(GARBAGE)
    assert [Decimal(result["cost_usd"]) for result in results] == bounds(airlock)
    assert {result["outcome"] for result in results} == {"unknown"}


NO_USAGE = [b"null", b"[]", b'"none"', b"{}", b'{"prompt_tokens": "many"}']
NO_USAGE += [
    b'{"prompt_tokens": %s, "completion_tokens": 5}' % odd for odd in (b"-5", b"1.5", b"true", b"1" + b"0" * 30)
]


def test_it_reports_no_usage(airlock: Airlock) -> None:
    bare = completion("an answer", None)
    told = [Raw(bare), *(Raw(bare.replace(b'"model"', b'"usage": %s, "model"' % usage)) for usage in NO_USAGE)]
    seen, results = many(airlock, told)
    assert seen == ["an answer"] * len(told)
    assert [Decimal(result["cost_usd"]) for result in results] == bounds(airlock)
    assert [result["usage"] for result in results] == [None] * len(told)


@pytest.mark.parametrize("refuses", ["stream_options", "stream"])
def test_it_does_not_stream_as_it_is_asked_to(airlock: Airlock, refuses: str) -> None:
    with Provider(root=[Refuses(refuses, DONE)]) as provider:
        done = ask(airlock, provider.url)
    assert (done.code, done.json["answer"]) == (0, "42")
    results = [r["body"]["outcome"] for r in airlock.records() if r["type"] == "call.result"]
    assert results == ["void", "answered"]  # each attempt with a reservation of its own
    assert [refuses in request.body for request in provider.requests] == [True, False]


def test_it_streams_for_ever(airlock: Airlock) -> None:
    """It is ended, the text that came is the reply, and what it may have used is paid for."""
    cell = "print([len(text) for text in llm_query_batched(['a', 'b'])])"
    with Provider(sub=[Endless()]) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED]
        policy = airlock.policy(models_output_tokens="16", models_output_floor="16")
        file = airlock.file("cell.py", cell)
        done = airlock("exec", file, "--context", "context.txt", *options, "--policy", policy, code=0)
    assert done.out == f"[{16 * BYTES_A_TOKEN}, {16 * BYTES_A_TOKEN}]\n"
    results = [r["body"] for r in airlock.records() if r["type"] == "call.result"]
    assert [(result["detail"], result["usage"]) for result in results] == [("length", None)] * 2
    assert [Decimal(result["cost_usd"]) for result in results] == bounds(airlock)


LIES = [(0, 5), (10, 0), (-5, 5), (10, -5), (10**30, 5), None]


def test_it_lies_about_its_usage(airlock: Airlock) -> None:
    """What cannot be is no report, in a stream as in a whole reply: it is charged at the bound."""
    seen, results = many(airlock, [Say("an answer", lie) for lie in LIES])
    assert seen == ["an answer"] * len(LIES)
    assert [Decimal(result["cost_usd"]) for result in results] == bounds(airlock)
    assert [result["usage"] for result in results] == [None] * len(LIES)


def test_a_parameter_that_could_make_a_request_dearer(airlock: Airlock) -> None:
    airlock.file("home/airlock.toml", '[models.mine]\nextra = {service_tier = "priority"}\n')
    with Provider(root=[DONE]) as provider:
        done = ask(airlock, provider.url)
        assert done.code == 2
        assert "extra: 'service_tier' may not be added to a request; what may: temperature, " in done.said
        airlock.file("home/airlock.toml", "[models.mine]\nextra = {temperature = 0.5}\n")
        assert ask(airlock, provider.url).code == 0
    assert [request.body["temperature"] for request in provider.requests] == [0.5]


def test_it_reports_more_than_it_can_have_used(airlock: Airlock) -> None:
    with Provider(root=[Say("FINAL(42)", (10**9, 10**9))]) as provider:
        done = ask(airlock, provider.url)
    assert done.code == 0
    assert Decimal(done.json["cost_usd"]) == bounds(airlock)[0]
    result = next(r["body"] for r in airlock.records() if r["type"] == "call.result")
    assert result["reported_usd"] == "3000.00"


def test_a_reply_that_was_cut_at_its_limit_is_continued(airlock: Airlock) -> None:
    with Provider(root=[Say("FINAL(The answer is lo", finish="length"), Say("ng)")]) as provider:
        done = ask(airlock, provider.url)
    assert (done.code, done.json["answer"], done.json["iterations"]) == (0, "The answer is long", 1)
    assert "exactly where it stopped" in provider.requests[1].text


def test_a_query_out_of_time_ends_while_the_provider_hangs(airlock: Airlock) -> None:
    with Provider(root=[Hang()]) as provider:
        done = ask(airlock, provider.url, "--timeout", 1, policy="default")
    assert done.code == 3
    assert done.json["status"] == "limit"
    assert "time-exceeded" in done.said
    assert Decimal(done.json["cost_usd"]) == bounds(airlock)[0] > 0


CELL = """
try:
    print(llm_query("What?"))
except SubCallError as error:
    print(type(error).__name__, error.kind, error)
print(llm_query_batched(["a", "b"], on_error="return")[1].__class__.__name__)
"""


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [(Fail(401), "provider-refused"), (Fail(500), "provider-busy"), (Hang(), "outcome-unknown")],
)
def test_a_failed_sub_call_is_a_typed_exception(airlock: Airlock, behaviour: Behaviour, kind: str) -> None:
    policy = airlock.policy(time_idle="1 s", counts_retries="0")
    with Provider(sub=[behaviour]) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED, "--policy", policy]
        done = airlock("exec", airlock.file("cell.py", CELL), "--context", "context.txt", *options, code=0)
    assert done.out.startswith(f"ProviderFailed {kind} ")
    assert done.out.endswith("\nProviderFailed\n")
    assert "127.0.0.1" not in done.out  # where the server is, the cell is not told
    (result,) = [r["body"]["detail"] for r in airlock.records() if r["type"] == "call.result"][:1]
    assert "the provider" in result  # nor the record, which is the tenant's
    assert "127.0.0.1" not in result


PASSWORD = "hunter2-secret"  # noqa: S105  of no account


@pytest.mark.parametrize("behaviour", [Fail(401), Fail(500, message=f"you said {PASSWORD}"), HangUp()])
def test_a_password_in_the_address_is_told_to_nobody(airlock: Airlock, behaviour: Behaviour) -> None:
    with Provider(sub=[behaviour], root=[behaviour]) as provider:
        url = provider.url.replace("://", f"://me:{PASSWORD}@")
        policy = airlock.policy(counts_retries="0")
        options = ["--model", "mine", "--base-url", url, *PRICED, "--policy", policy]
        cell = airlock("exec", airlock.file("cell.py", CELL), *options, code=0)
        query = airlock("run", "What?", "--context", "context.txt", *options, code=5)
        stray = airlock("run", "What?", "--context", "context.txt", *options[:3], url.replace("http", "ftp"), code=2)
    for done in (cell, query, stray):
        assert PASSWORD not in done.out + done.err
    assert all(PASSWORD.encode() not in path.read_bytes() for path in airlock.home.rglob("*") if path.is_file())


def test_a_cell_that_writes_the_password_of_the_address_leaves_it_out_of_the_journal(airlock: Airlock) -> None:
    with Provider() as provider:
        url = provider.url.replace("://", f"://me:{PASSWORD}@")
        file = airlock.file("cell.py", f"print('{PASSWORD}')")
        airlock("exec", file, "--model", "mine", "--base-url", url, *PRICED, code=0)
    shown = airlock("audit", "show", "last", code=0)
    assert PASSWORD not in shown.out
    assert "[redacted: known secret]" in shown.out
