"""Keywords of `rlms`: taken where they mean something here, else refused by name, and never passed over."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import RLM, RequestError
from orchestrator.core.events import Event
from orchestrator.rlms import SubcallCallbacks

THEIRS: dict[str, Any] = {"backend": "openai", "backend_kwargs": {"model_name": "m"}, "environment": "local"}


def refused(**keywords: Any) -> str:
    with pytest.raises(RequestError) as caught:
        RLM(**{**THEIRS, **keywords})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("environment_kwargs", {"image": "x"}, "policy"),
        ("depth", 1, "max_depth"),
        ("max_tokens", 1000, "max_budget"),
        ("max_errors", 3, "max_iterations"),
        ("custom_system_prompt", "You are", "question"),
        ("user_prologue", "Tip", "question"),
        ("orchestrator", False, "prompt"),
        ("logger", object(), "airlock audit show"),
        ("persistent", True, "one query"),
        ("custom_tools", {"f": len}, "context"),
        ("custom_sub_tools", {"f": len}, "context"),
        ("compaction", True, "by itself"),
        ("on_iteration_start", print, "verbose=True"),
        ("on_iteration_complete", print, "verbose=True"),
        ("sampling_args", {"temperature": 0}, "airlock.toml"),
        ("sub_sampling_args", {"temperature": 0}, "airlock.toml"),
    ],
)
def test_what_is_not_here_is_refused_by_name(name: str, value: Any, instead: str):
    said = refused(**{name: value})
    assert said.startswith(f"{name} of rlms is not there: ")
    assert instead in said


def test_a_keyword_that_nobody_knows():
    with pytest.raises(TypeError, match="'modle'"):
        RLM(modle="m")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backend": "anthropic"}, "backend 'anthropic' of rlms is not there: name an OpenAI-compatible server"),
        ({"backend": "bubblewrap"}, "the sandbox is named by environment"),
        ({"backend": "vllm"}, "address of its server"),
        ({"backend_kwargs": {"model_name": "m", "timeout": 5}}, "backend_kwargs['timeout'] is not there"),
        ({"backend_kwargs": {"sampling_args": {"seed": 1}}}, "sampling_args of rlms"),
        ({"other_backends": ["openai"]}, "needs other_backend_kwargs"),
        ({"other_backends": ["openai", "openai"]}, "takes one entry"),
        (
            {"other_backends": ["openai"], "other_backend_kwargs": [{"model_name": "s", "base_url": "http://o"}]},
            "another base_url than the root",
        ),
        ({"other_backends": ["anthropic"], "other_backend_kwargs": [{"model_name": "s"}]}, "'anthropic'"),
    ],
)
def test_an_lm_that_would_not_be_the_one_that_is_asked(changes: dict[str, Any], says: str):
    assert says in refused(**changes)


def test_a_key_is_taken_from_the_variable_of_its_provider():
    chosen = RLM("openrouter", {"model_name": "m"})._rlm._choices
    assert (chosen["base_url"], chosen["api_key_env"]) == ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY")
    chosen = RLM("openai", {"model_name": "m"}, "docker")._rlm._choices
    assert (chosen["backend"], chosen["base_url"], chosen["api_key_env"]) == ("docker", None, None)


def test_other_backends_belong_to_the_style_of_rlms():
    with pytest.raises(RequestError, match="sub_model"):
        RLM(model="m", other_backend_kwargs=[{"model_name": "s"}])


def test_callbacks_are_told_of_every_attempt():
    seen: list[tuple[Any, ...]] = []
    callbacks = SubcallCallbacks(lambda *given: seen.append(given), lambda *given: seen.append(given))
    intent = {"call": "root.c2", "role": "sub", "model": "m"}
    prompt = {"prompt": '[{"role": "user", "content": "' + "x" * 100 + '"}]'}
    for outcome, detail in (("void", "busy"), ("answered", "stop")):
        callbacks.event(Event("call.intent", "root", {**intent, "role": "root", "call": "root.c1"}, prompt))
        callbacks.event(Event("call.intent", "root", intent, prompt))
        callbacks.event(Event("call.result", "root", {"call": "root.c2", "outcome": outcome, "detail": detail}))
        callbacks.event(Event("call.result", "root", {"call": "root.c1", "outcome": outcome, "detail": detail}))
    assert [given[:2] for given in seen] == [(1, "m")] * 4
    assert seen[0][2] == "x" * 80
    assert [given[3] for given in seen if len(given) == 4] == ["busy", None]


def test_child_queries_are_sub_calls_to_the_callbacks():
    seen: list[tuple[Any, ...]] = []
    calls = SubcallCallbacks(lambda *given: seen.append(given), lambda *given: seen.append(given))
    calls.event(Event("node.opened", "root.1", {"model": "m"}, {"question": "q" * 100}))
    calls.event(Event("call.intent", "root.1", {"call": "root.1.c1", "role": "root", "model": "m"}, {"prompt": "[]"}))
    calls.event(Event("node.opened", "root.1.1", {"model": "n"}, {"question": "deeper"}))
    calls.event(Event("node.closed", "root.1.1", {"status": "limit", "reason": "no money"}))
    calls.event(Event("node.closed", "root.1", {"status": "answered", "reason": ""}))
    assert [given[:2] for given in seen] == [(1, "m"), (2, "n"), (2, "n"), (1, "m")]
    assert seen[0][2] == "q" * 80
    assert [given[3] for given in seen if len(given) == 4] == ["no money", None]
