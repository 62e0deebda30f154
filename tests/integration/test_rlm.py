"""`RLM` and `AsyncRLM`, in both calling styles, over a real sandbox and a provider on a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator import RLM, AsyncRLM, Completion, LimitError, MachineError, ProviderError, RequestError
from orchestrator.choices import Choices
from tests.command import Airlock
from tests.fakes.provider import Fail, Hang, Provider, Say, Seen

pytestmark = pytest.mark.anyio
PRICES = {"fake": (1, 2)}
LOOK = Say("```repl\nfound = str(len(context))\nprint(llm_query('SUB'))\n```", usage=(100, 50))
END = Say("FINAL_VAR(found)", usage=(200, 20))
SUB = Say("sub-answer", usage=(10, 5))
COST = Decimal("0.00046")  # 310 tokens in at 1 USD a million, 75 out at 2


def by_turn(seen: Seen) -> Say:
    """Told from the request alone, so that several queries may be under way at once."""
    if seen.role == "sub":
        return SUB
    return END if any(message["role"] == "assistant" for message in seen.body["messages"]) else LOOK


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        running.answer = by_turn
        yield running


@pytest.fixture
def home(fresh: Airlock) -> Iterator[Path]:
    yield fresh.home
    fresh.nothing_left()


def ours(provider: Provider, home: Path, **more: Any) -> dict[str, Any]:
    return {"model": "fake", "base_url": provider.url, "api_key": "key", "prices": PRICES, "home": home, **more}


def theirs(provider: Provider, home: Path, **more: Any) -> dict[str, Any]:
    kwargs = {"model_name": "fake", "base_url": provider.url, "api_key": "key"}
    style = {"backend": "openai", "backend_kwargs": kwargs, "environment": "local"}
    return {**style, "prices": PRICES, "home": home, **more}


def check(done: Completion, context: Any) -> None:
    assert (done.response, done.status, done.reason, done.error) == (str(len(context)), "answered", "", None)
    assert (done.iterations, done.sub_calls, done.root_model, done.prompt) == (2, 1, "fake", context)
    summary = done.usage_summary.model_usage_summaries["fake"]
    assert (summary.total_calls, summary.total_input_tokens, summary.total_output_tokens) == (3, 310, 75)
    assert Decimal(done.cost_usd) == COST
    assert summary.total_cost == pytest.approx(float(COST))
    assert 0 < done.execution_time < 60
    assert len(done.journal_head) == 64


def test_a_completion_has_the_promised_fields() -> None:
    promised = "response status reason cost_usd usage_summary execution_time query_id iterations sub_calls"
    promised += " journal_head checkpoint"
    as_in_rlms = "root_model prompt response usage_summary execution_time metadata error"
    assert {*promised.split(), *as_in_rlms.split()} == {field.name for field in fields(Completion)}


def test_our_style(provider: Provider, home: Path) -> None:
    with RLM(**ours(provider, home)) as rlm:
        check(rlm.completion("How long is it?", "some context"), "some context")
        check(rlm.completion(query="How long is it?", context=["a", "b"]), ["a", "b"])
    assert {request.key for request in provider.requests} == {"key"}


def test_the_style_of_rlms(provider: Provider, home: Path) -> None:
    rlm = RLM(**theirs(provider, home, max_iterations=5, max_depth=1, max_timeout=60, max_budget=0.5))
    check(rlm.completion("some context", root_prompt="How long is it?"), "some context")
    check(rlm.completion(prompt={"a": 1}, root_prompt="How long is it?"), {"a": 1})
    rlm.close()
    rlm.close()
    assert "How long is it?" in str(provider.requests[0].body)


async def test_async_in_both_styles(provider: Provider, home: Path) -> None:
    async with AsyncRLM(**ours(provider, home)) as rlm:
        check(await rlm.completion("How long is it?", "some context"), "some context")
    rlm = AsyncRLM(**theirs(provider, home))
    check(await rlm.completion("some context", root_prompt="How long is it?"), "some context")
    await rlm.aclose()


async def test_concurrent_completions_of_one_object(provider: Provider, home: Path) -> None:
    done: dict[int, Completion] = {}

    async def one(rlm: AsyncRLM, length: int) -> None:
        done[length] = await rlm.completion("How long is it?", "x" * length)

    async with AsyncRLM(**ours(provider, home)) as rlm, anyio.create_task_group() as tasks:
        for length in range(1, 7):
            tasks.start_soon(one, rlm, length)
    assert {length: completion.response for length, completion in done.items()} == {n: str(n) for n in range(1, 7)}
    assert len({completion.query_id for completion in done.values()}) == 6


async def test_concurrent_first_completions_open_one_platform(provider: Provider, home: Path) -> None:
    rlm = AsyncRLM(**ours(provider, home))
    async with anyio.create_task_group() as tasks:
        for text in ("a", "bb", "ccc"):
            tasks.start_soon(rlm.completion, "How long is it?", text)
    await rlm.aclose()
    assert len(provider.of("root")) == 6


def test_several_objects_in_one_process(provider: Provider, home: Path, tmp_path: Path) -> None:
    with RLM(**ours(provider, home)) as one, RLM(**ours(provider, tmp_path / "other")) as two:
        assert one.completion("How long?", "abc").response == "3"
        assert two.completion("How long?", "abcd").response == "4"


def test_files_and_folders(provider: Provider, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("five!")
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    with RLM(**ours(provider, home)) as rlm:
        assert rlm.completion("How long is it?", file).response == "5"
        assert rlm.completion("How many?", folder).response == "2"


async def test_a_cancelled_completion_is_closed_in_good_order(provider: Provider, home: Path, fresh: Airlock) -> None:
    provider.answer = lambda _seen: Hang()
    async with AsyncRLM(**ours(provider, home)) as rlm, anyio.create_task_group() as tasks:
        tasks.start_soon(rlm.completion, "How long is it?", "text")
        await anyio.to_thread.run_sync(provider.wait, "root")
        tasks.cancel_scope.cancel()
    assert fresh.closing()["status"] == "cancelled"
    assert Decimal(fresh.closing()["cost_usd"]) > 0


def test_errors_by_what_the_caller_can_do(provider: Provider, home: Path) -> None:
    with RLM(**ours(provider, home)) as rlm:
        for arguments in [
            ("", "text"),
            ("What?", ""),
            ("What?", object()),
            ("What?", Path("/nowhere")),
            ("What?",),
            (),
        ]:
            with pytest.raises(RequestError):
                rlm.completion(*arguments)
        with pytest.raises(RequestError):
            rlm.completion("What?", "text", root_prompt="What?")
        provider.answer = lambda _seen: Fail(401)
        with pytest.raises(ProviderError, match="refused the API key"):
            rlm.completion("What?", "text")
    with RLM(**ours(provider, home, max_budget="0.000001")) as rlm, pytest.raises(LimitError, match="smaller than"):
        rlm.completion("What?", "text")
    with RLM(**ours(provider, Path("/proc/nowhere"))) as rlm, pytest.raises(MachineError, match="data folder"):
        rlm.completion("What?", "text")


def test_a_limit_under_way_is_a_status(provider: Provider, home: Path) -> None:
    provider.answer = lambda seen: (
        Say("FINAL(so far)") if "last turn" in seen.text else LOOK if seen.role == "root" else SUB
    )
    with RLM(**ours(provider, home, max_iterations=2)) as rlm:
        done = rlm.completion("How long is it?", "text")
    assert (done.status, done.response) == ("limit", "so far")
    assert done.reason == done.error == "count-exceeded: all 2 turns are used"


def test_an_answer_schema(provider: Provider, home: Path) -> None:
    with RLM(**ours(provider, home, answer_schema={"type": "integer"})) as rlm:
        assert rlm.completion("How long is it?", "text").response == "4"


def test_limits_are_checked_as_on_the_command_line(home: Path) -> None:
    def refused(**limits: Any) -> str:
        with pytest.raises(RequestError) as caught, RLM(**{"model": "fake", "home": home, **limits}) as rlm:
            rlm.completion("What?", "text")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    nan, inf = float("nan"), float("inf")
    wrong: dict[str, list[Any]] = {
        "max_budget": [-1, nan, inf, True, "lots", [], Decimal("NaN"), 10**12],
        "max_timeout": [0, -1, nan, inf, True, "60", [], 10**9],
        "max_iterations": [0, -1, 1.5, nan, True, "3", 2**60],
        "max_depth": [-1, 0.5, True, "1"],
        "max_concurrent_subcalls": [0, -1, 2.0, False],
        "prices": [{"fake": 1}, {"fake": (1,)}, {"fake": ("a", "b")}, {"fake": (nan, 1)}, {"fake": (-1, 1)}],
        "answer_schema": [{"type": "strung"}, "text", {"const": object()}],
        "model": [5, True],
        "policy": [None, 5],
        "base_url": [5],
    }
    for name, values in wrong.items():
        for value in values:
            assert name in refused(**{name: value})
    assert refused(max_depth=2) == "a depth of 2: policy default permits a depth of 1"


def test_a_policy_holds_where_it_is_stricter(provider: Provider, home: Path, fresh: Airlock) -> None:
    with RLM(**ours(provider, home, max_budget=500, max_iterations=10**6, max_timeout=10**6)) as rlm:
        check(rlm.completion("How long is it?", "some context"), "some context")
    policy = json.loads(fresh.history()[0].payloads["policy"])
    assert (policy["money"]["query"], policy["counts"]["iterations"]) == ("1.00 USD", 30)
    with RLM(**ours(provider, home, max_budget="0.5", max_iterations=3, max_concurrent_subcalls=2)) as rlm:
        rlm.completion("How long is it?", "some context")
    policy = json.loads(fresh.history()[0].payloads["policy"])
    counts = policy["counts"]
    assert (policy["money"]["query"], counts["iterations"], counts["in_flight"]) == ("0.50 USD", 3, 2)


def test_a_call_of_rlms_with_all_of_its_keywords(provider: Provider, home: Path, capfd: Any) -> None:
    seen: list[tuple[Any, ...]] = []
    rlm = RLM(
        "openai",
        {"model_name": "fake", "base_url": provider.url, "api_key": "key"},
        "local",
        environment_kwargs={},
        depth=0,
        max_depth=1,
        max_iterations=30,
        max_budget=None,
        max_timeout=None,
        max_tokens=None,
        max_errors=None,
        custom_system_prompt=None,
        other_backends=["openai"],
        other_backend_kwargs=[{"model_name": "small", "base_url": provider.url, "api_key": "key"}],
        logger=None,
        verbose=True,
        persistent=False,
        custom_tools=None,
        custom_sub_tools=None,
        compaction=False,
        compaction_threshold_pct=0.85,
        max_concurrent_subcalls=4,
        on_subcall_start=lambda *given: seen.append(given),
        on_subcall_complete=lambda *given: seen.append(given),
        on_iteration_start=None,
        on_iteration_complete=None,
        sampling_args=None,
        sub_sampling_args=None,
        orchestrator=True,
        user_prologue=None,
        prices={**PRICES, "small": (1, 2)},
        home=home,
    )
    with rlm:
        done = rlm.completion("some context", "How long is it?")  # by position, as in rlms
        assert (done.response, done.prompt) == ("12", "some context")
        assert "How long is it?" in str(provider.requests[0].body)
        assert rlm.completion("Print the first ten primes.").response == "27"
        assert "The context is a request" in str(provider.of("root")[-1].body)
    (start, complete, *_) = seen
    assert start == (1, "small", "SUB")
    assert (*complete[:2], complete[3]) == (1, "small", None)
    assert 0 < complete[2] < 20
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "answered: 2 turns, 1 sub-call," in printed.err
    summary = done.usage_summary
    assert (summary.total_input_tokens, summary.total_output_tokens) == (310, 75)
    assert set(done.to_dict()["usage_summary"]["model_usage_summaries"]) == {"fake", "small"}
    assert summary.to_dict()["total_cost"] == pytest.approx(float(done.cost_usd))


def test_the_key_is_nowhere_to_be_seen(provider: Provider, home: Path) -> None:
    with RLM(**ours(provider, home, api_key="sk-very-secret")) as rlm:
        shown = repr(rlm) + repr(rlm.completion("How long is it?", "text")) + repr(Choices(api_key="sk-very-secret"))
    assert "sk-very-secret" not in shown
    assert all(b"sk-very-secret" not in path.read_bytes() for path in home.rglob("*") if path.is_file())
