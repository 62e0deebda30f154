"""A hard cap on money, and sub-calls that nobody permitted: what the provider counts never exceeds what was granted."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from decimal import Decimal

import pytest

from tests.command import Airlock, Done
from tests.fakes.provider import Hang, Provider, Say, Seen

PRICE_IN, PRICE_OUT = Decimal(1), Decimal(2)  # USD per million tokens
PRICED = ("--price", f"mine={PRICE_IN},{PRICE_OUT}")
GREEDY = Say("an answer", usage="most", delay_s=0.05)


def counted(provider: Provider) -> Decimal:
    """What the provider would put on the bill."""
    return sum(((PRICE_IN * i + PRICE_OUT * o) / 10**6 for i, o in provider.used), Decimal(0))


def execute(airlock: Airlock, url: str, code: str, *more: object) -> Done:
    file = airlock.file("cell.py", textwrap.dedent(code))
    return airlock("exec", file, "--context", "context.txt", "--model", "mine", "--base-url", url, *PRICED, *more)


FLOOD = """
    import collections, threading
    counts = collections.Counter()
    def one(n):
        try:
            llm_query("question %03d " % n + "x" * 1000)
            counts["answered"] += 1
        except SubCallError as error:
            counts[type(error).__name__] += 1
            assert error.limit == "0.05 USD" and error.asked.endswith(" USD"), vars(error)
    threads = [threading.Thread(target=one, args=(n,)) for n in range(64)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    for item in llm_query_batched(["batch"] * 64, on_error="return"):
        counts[type(item).__name__] += 1
    import json
    print(json.dumps(counts))
    print(json.dumps(budget()))
"""


def test_64_sub_calls_at_once_cannot_overshoot_a_hard_cap(airlock: Airlock) -> None:
    cap = Decimal("0.05")
    # A little over 9,000 nano-USD a call at the most: the cap pays for some of them and not for all.
    policy = airlock.policy(money_query=f"{cap} USD", models_output_tokens="2000", models_output_floor="1500")
    with Provider(sub=[GREEDY]) as provider:
        done = execute(airlock, provider.url, FLOOD, "--policy", policy)
    assert done.code == 0, done
    counts, left = map(json.loads, done.out.splitlines())
    assert 0 < counted(provider) <= cap
    assert counts["answered"] + counts.get("str", 0) == len(provider.used) > 0
    assert counts.get("BudgetInFlight", 0) > 0
    assert counts.get("BudgetExhausted", 0) > 0
    assert sum(counts.values()) == 128
    assert provider.most_at_once > 1
    assert Decimal(airlock.closing()["cost_usd"]) == counted(provider)
    assert Decimal(left["usd_left"]) == cap - counted(provider)
    assert Decimal(left["usd_spent"]) == counted(provider)


def test_many_queries_share_the_purse_of_their_tenant(airlock: Airlock) -> None:
    cap = Decimal("0.02")
    policy = airlock.policy(money_tenant_day=f"{cap} USD", models_output_tokens="1000", models_output_floor="900")
    code = """
        from collections import Counter
        print(Counter(type(item).__name__ for item in llm_query_batched(["x"] * 64, on_error="return")))
    """
    file = airlock.file("cell.py", textwrap.dedent(code))
    with Provider(sub=[GREEDY]) as provider:
        options = [
            "--context",
            "context.txt",
            "--model",
            "mine",
            "--base-url",
            provider.url,
            *PRICED,
            "--policy",
            policy,
        ]
        with airlock.started("exec", file, *options) as one, airlock.started("exec", file, *options) as two:
            ends = [one.end(), two.end()]
    assert [end.code for end in ends] == [0, 0], ends
    assert 0 < counted(provider) <= cap
    spent = airlock.rows("SELECT spent FROM scopes WHERE id LIKE 'tenant-day:%'")
    assert Decimal(spent[0][0]) / 10**9 == counted(provider)


@pytest.mark.parametrize("budget", ["0", "0.000001", "0.003"])
def test_a_budget_smaller_than_one_turn_is_refused_before_anything_is_asked(airlock: Airlock, budget: str) -> None:
    with Provider() as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED, "--budget", budget, "--json"]
        done = airlock("run", "What?", "--context", "context.txt", *options, code=3)
    assert not provider.requests
    assert (done.json["status"], done.json["answer"], done.json["cost_usd"]) == ("refused", None, "0.00")
    assert done.json["reason"].startswith("budget-exhausted: ")
    assert "raise --budget" in done.said
    assert "sandbox.started" not in [r["type"] for r in airlock.records()]


def test_a_budget_of_zero_pays_for_a_free_model(airlock: Airlock) -> None:
    script = airlock.file("script.yaml", "root: ['FINAL(42)']")
    options = ["--model", f"scripted:{script}", "--budget", "0"]
    assert airlock("run", "What?", "--context", "context.txt", *options, code=0).out == "42\n"


def test_sub_calls_on_a_budget_of_zero(airlock: Airlock) -> None:
    code = """
        try:
            llm_query("What?")
        except BudgetExhausted as error:
            print(error.kind, error.limit, error.left)
    """
    with Provider() as provider:
        done = execute(airlock, provider.url, code, "--budget", "0")
    assert (done.code, done.out) == (0, "budget-exhausted 0.00 USD 0.00 USD\n")
    assert not provider.requests


def test_a_query_that_runs_out_of_money_ends_with_its_best_answer(airlock: Airlock) -> None:
    def say(seen: Seen) -> str:
        return "FINAL(as far as I got)" if "last turn" in seen.text else "```repl\nprint(llm_query('x' * 5000))\n```"

    cap = Decimal("0.06")
    with Provider(root=[Say(say, usage="most")], sub=[Say("no", usage="most")]) as provider:
        options = ["--model", "mine", "--base-url", provider.url, *PRICED, "--budget", str(cap), "--json"]
        done = airlock("run", "What?", "--context", "context.txt", *options, code=3)
    assert (done.json["status"], done.json["answer"]) == ("limit", "as far as I got")
    assert done.json["reason"].startswith("budget-")
    assert counted(provider) == Decimal(done.json["cost_usd"]) <= cap
    assert "last turn" in provider.requests[-1].text


NAMES = """
    for model in {names}:
        try:
            print("ANSWERED", llm_query("What?", model=model))
        except NotPermitted as error:
            print(error.kind, model in str(error))
"""


def test_a_guest_cannot_name_a_model_of_its_own(airlock: Airlock) -> None:
    fifo = airlock.folder / "trap"
    os.mkfifo(fifo)  # whoever opens it waits until the test gives up
    names = ["gpt-5", "local:/etc/passwd", "scripted:/etc/passwd", "../../etc/passwd", "MINE", "mine ", ""]
    names += [f"{kind}:{fifo}" for kind in ("local", "scripted")] + ["local:../../trap", "http://127.0.0.1:1/v1", "*"]
    with Provider(sub=[Say("an answer")]) as provider:
        done = execute(airlock, provider.url, NAMES.format(names=names), "--policy", airlock.policy(time_query="20 s"))
    assert done.code == 0, done
    # An empty name is no name: it gets the model that the host chose.
    assert done.out.splitlines().count("not-permitted True") == len(names) - 1
    assert [request.body["model"] for request in provider.requests] == ["mine"]
    refused = [r["body"] for r in airlock.records() if r["type"] == "call.refused"]
    assert [body["model"] for body in refused] == [name for name in names if name]


def test_the_policy_says_which_models_may_be_asked(airlock: Airlock) -> None:
    code = "try: llm_query('x')\nexcept NotPermitted as error: print(error)"
    with Provider() as provider:
        done = execute(airlock, provider.url, code, "--policy", airlock.policy(models_sub='["other/*"]'))
        assert (done.code, provider.requests) == (3, [])
        assert "does not permit model 'mine' for sub calls" in done.said
        options = [
            "--model",
            "mine",
            "--base-url",
            provider.url,
            *PRICED,
            "--policy",
            airlock.policy(models_root='["x"]'),
        ]
        done = airlock("run", "What?", "--context", "context.txt", *options, code=3)
        assert "does not permit model 'mine' for root calls" in done.said
    assert not provider.requests


CHILD_QUERY = """
    for ask in (rlm_query, lambda prompt: rlm_query_batched([prompt])):
        try:
            ask("Find out")
        except SubCallError as error:
            print(error.kind, error)
"""


def test_child_queries_are_not_permitted_at_depth_0(airlock: Airlock) -> None:
    with Provider() as provider:
        done = execute(airlock, provider.url, CHILD_QUERY, "--depth", 0)
    assert done.code == 0, done
    assert done.out.count("not-permitted ") == 2
    assert done.out.count("rlm_query is not permitted by policy") == 2


def test_depth_0_switches_sub_calls_off(airlock: Airlock) -> None:
    code = "try: llm_query('x')\nexcept NotPermitted as error: print(error)"
    with Provider(root=[Say(f"```repl\n{code}\n```"), Say("FINAL(done)")]) as provider:
        done = execute(airlock, provider.url, code, "--depth", 0)
        assert (done.code, done.out) == (0, "llm_query is not permitted by policy\n")
        options = ["--model", "mine", "--base-url", provider.url, *PRICED, "--depth", 0]
        assert airlock("run", "What?", "--context", "context.txt", *options, code=0).out == "done\n"
    assert provider.of("sub") == []
    told = provider.requests[0].body["messages"][0]["content"]
    assert "llm_query is not permitted" in told
    assert "llm_query_batched" not in told
    assert "llm_query is not permitted by policy" in provider.requests[1].text


def test_without_a_model_there_is_nobody_to_ask(airlock: Airlock) -> None:
    file = airlock.file("cell.py", "try: llm_query('x')\nexcept NotPermitted as error: print(error)")
    done = airlock("exec", file, "--context", "context.txt", code=0)
    assert done.out == "there is no model for sub-calls: name one with --model or --sub-model\n"


def test_sub_calls_go_to_the_sub_model(airlock: Airlock) -> None:
    replies: Sequence[Say] = [
        Say("```repl\nprint(llm_query('a'), llm_query('b', model='mine'))\n```"),
        Say("FINAL(ok)"),
    ]
    with Provider(root=replies, sub=[Say("yes")]) as provider:
        options = [
            "--model",
            "mine",
            "--sub-model",
            "small",
            "--base-url",
            provider.url,
            *PRICED,
            "--price",
            "small=1,1",
        ]
        done = airlock("run", "What?", "--context", "context.txt", *options, "--json", code=0)
    assert [request.body["model"] for request in provider.requests] == ["mine", "small", "mine", "mine"]
    assert {name: usage["calls"] for name, usage in done.json["usage"].items()} == {"mine": 3, "small": 1}


def test_counts_are_limits_too(airlock: Airlock) -> None:
    code = """
        kinds = [getattr(item, "kind", "ok") for item in llm_query_batched(["x"] * 6, on_error="return")]
        print(sorted(kinds))
        try:
            llm_query("y" * 3000)
        except CountExceeded as error:
            print(error.limit)
    """
    policy = airlock.policy(counts_sub_calls="4")
    with Provider(sub=[Say("yes")]) as provider:
        done = execute(airlock, provider.url, code, "--policy", policy)
        assert done.out.splitlines() == ["['count-exceeded', 'count-exceeded', 'ok', 'ok', 'ok', 'ok']", "4"]
        policy = airlock.policy(models_prompt="2 KiB")
        done = execute(airlock, provider.url, "llm_query('y' * 3000)", "--policy", policy)
    assert (done.code, "CountExceeded" in done.err) == (1, True)
    assert len(provider.requests) == 4


def test_no_more_sub_calls_in_flight_than_the_policy_has(airlock: Airlock) -> None:
    policy = airlock.policy(counts_in_flight="3")
    with Provider(sub=[Say("yes", delay_s=0.05)]) as provider:
        done = execute(airlock, provider.url, "print(len(llm_query_batched(['x'] * 12)))", "--policy", policy)
    assert (done.code, done.out) == (0, "12\n")
    assert provider.most_at_once == 3


def test_sub_calls_that_a_dying_cell_leaves_are_charged_and_settled(airlock: Airlock) -> None:
    code = """
        import os, threading
        threading.Thread(target=llm_query, args=("slow",), daemon=True).start()
        print(llm_query("quick"), flush=True)
        os.kill(os.getpid(), 9)
    """

    def quick(_seen: Seen) -> str:
        provider.wait("sub", 2)  # answered when the slow one is on its way, too
        return "quick"

    with Provider() as provider:
        provider.answer = lambda seen: Hang() if seen.text == "slow" else Say(quick)
        done = execute(airlock, provider.url, code)
    assert (done.code, done.out) == (4, "quick\n")
    records = airlock.records()
    (result,) = (r["body"] for r in records if r["type"] == "call.result" and r["body"]["outcome"] == "unknown")
    bound = next(r["body"] for r in records if r["type"] == "call.intent" and r["body"]["call"] == result["call"])
    assert (result["detail"], result["cost_usd"]) == ("cancelled", bound["bound_usd"])
