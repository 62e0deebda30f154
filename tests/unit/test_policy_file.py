"""A policy file: each fault is told with its line, and no file gives more than a PolicyError."""

from __future__ import annotations

import itertools
import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.core.errors import PolicyError
from orchestrator.core.policy_file import parse_policy, policy_text, policy_values
from tests.unit.helpers import POLICIES, quick

TEXT = (POLICIES / "default.yaml").read_text()
LINES = TEXT.splitlines()


def faults(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return str(caught.value).split("\n")


def line_of(key: str) -> int:
    return next(number for number, line in enumerate(LINES, 1) if line.strip().startswith(f"{key}:"))


def changed(key: str, line: str) -> str:
    number = line_of(key)
    return "\n".join([*LINES[: number - 1], line, *LINES[number:]])


@pytest.mark.parametrize("name", sorted(path.name for path in POLICIES.glob("*.yaml")))
def test_the_shipped_policies_are_policies(name: str):
    parse_policy((POLICIES / name).read_text(), name)


@pytest.mark.parametrize("name", sorted(path.name for path in POLICIES.glob("*.yaml")))
def test_a_policy_that_is_written_can_be_read(name: str):
    text = (POLICIES / name).read_text()
    policy = parse_policy(text, name)
    assert parse_policy(policy_text(policy), name) == policy


def test_a_policy_is_shown_as_its_file_has_it():
    read, written = yaml.safe_load(TEXT), policy_values(parse_policy(TEXT, "p"))
    for section in ("models", "time", "counts", "tenant", "audit"):
        assert written[section] == read[section]
    assert written["sandbox"]["memory"] == read["sandbox"]["memory"]


def test_a_policy_that_was_narrowed_is_written_too():
    policy = parse_policy(TEXT, "p").narrowed(parse_policy(changed("root", "  root: [a, '*b']"), "p"))
    assert policy_values(policy)["models"]["root"] == [["*"], ["a", "*b"]]
    assert parse_policy(policy_text(policy), "p") == policy


@pytest.mark.parametrize(
    ("key", "line", "said"),
    [
        ("prompt", "  prompt: 512", "models.prompt: needs a number and a unit"),
        ("prompt", "  prompt: 0 B", "models.prompt: has to be more than 0"),
        ("cpu", "  cpu: 1 MiB", "sandbox.cpu: needs a number and a unit out of core, cores"),
        ("query", "  query: 1 EUR", "money.query: needs a number and a unit"),
        ("query", "  query:", "money.query: needs a number and a unit"),
        ("root", "  root: []", "models.root.0: must not be empty"),
        ("root", "  root: gpt", "models.root: has to be a list of names"),
        ("root", "  root: [1]", "models.root.0.0: has to be a name"),
        ("iterations", "  iterations: 30.0", "counts.iterations: has to be a whole number"),
        ("iterations", "  iterations: true", "counts.iterations: has to be a whole number"),
        ("iterations", "  iterations: 0", "counts.iterations: has to be at least 1"),
        ("iterations", "  iterations: 99999999999999999999", "counts.iterations: has to be 9007199254740991 at most"),
        ("depth", "  depth: 9", "counts.depth: has to be 8 at most"),
        ("payloads", "  payloads: some", "audit.payloads: has to be keep, hash, or a list of question, policy"),
        ("verify_context", "  verify_context: 1", "audit.verify_context: has to be true or false"),
        ("image", "  image: perl", "sandbox.image: has to be 'python' or 'data'"),
        ("fallbacks", f"  fallbacks: [{'a, ' * 9}]", "models.fallbacks: has to have 8 parts at most"),
        ("pids", "  pidz: 64", "sandbox.pidz: is not a key of policies; policies/README.md lists them"),
        ("pids", "  64: 64", "sandbox.64: is not a key of policies; policies/README.md lists them"),
    ],
)
def test_a_fault_names_its_line(key: str, line: str, said: str):
    found = faults(changed(key, line))
    assert any(fault.startswith(f"p.yaml:{line_of(key)}: {said}") for fault in found), found


def test_a_key_that_is_missing_is_told_with_its_section():
    assert faults(TEXT.replace("  pids: 64\n", "")) == [f"p.yaml:{line_of('sandbox')}: sandbox.pids: is missing"]


def test_all_faults_are_told_at_once():
    assert len(faults(changed("pids", "  pids: x").replace("idle: 3 min", "idle: 3"))) == 2


@pytest.mark.parametrize("section", [line[:-1] for line in LINES if re.match(r"^\w+:$", line)])
def test_a_section_that_is_no_mapping(section: str):
    for value in ("", " 3", " [a]", " text"):
        body = rf"(?m)^{section}:\n(?:  .*\n?)+"
        found = faults(re.sub(body, f"{section}:{value}\n", TEXT))
        assert found == [f"p.yaml:{line_of(section)}: {section}: has to be a mapping of keys"]


def test_a_key_that_is_there_twice_hides_nothing():
    assert faults(TEXT + "money:\n  query: 2 USD\n")[0].endswith(": money: is there twice")
    assert faults(changed("query", "  query: 1 USD\n  query: 99 USD"))[0].startswith(f"p.yaml:{line_of('query') + 1}: ")


@pytest.mark.parametrize("text", ["", "null", "[]", "a", "- a: b", "5", "!!set {a, b}", "# nothing"])
def test_what_is_no_mapping_is_no_policy(text: str):
    assert faults(text) == ["p.yaml:1: a policy is a mapping of sections; see policies/default.yaml"]


def test_aliases_are_refused_before_they_are_followed():
    bomb = "a: &a {k: 1, l: 1}\n"
    bomb += "".join(f"{new}: &{new} {{k: *{old}, l: *{old}}}\n" for old, new in itertools.pairwise("abcdefgh"))
    assert faults(bomb) == ["p.yaml:2: not YAML: a policy has no aliases"]
    assert faults("&a\nmodels: *a") == ["p.yaml:2: not YAML: a policy has no aliases"]


@pytest.mark.parametrize(
    "value",
    [
        "!!bool x",
        "!!timestamp x",
        "!!int ''",
        "!!float ''",
        "!!binary x",
        "2001-99-99",
        "0b_",
        "!!python/name:os",
        "{? [a] : b}",
    ],
)
def test_values_that_the_yaml_library_stumbles_over(value: str):
    assert faults(f"models: {value}")[0].startswith("p.yaml:1: not YAML: ")


def test_deep_nesting_is_no_way_out():
    assert faults("models: " + "[" * 400)[0].startswith("p.yaml:1: not YAML: ")
    assert faults("{a: " * 400)[0].startswith("p.yaml:1: not YAML: ")


pieces = st.sampled_from(
    [*LINES, "  ", "\n", ":", "- ", "&a ", "*a", "!!", "{", "}", "[", "]", "? ", "|", "<<: ", "\x00", "'", "%"]
)


@quick
@given(st.one_of(st.text(), st.lists(pieces).map("\n".join), st.lists(pieces).map("".join)))
@example("\ud800")
@example("? {a: b}\n: c")
@example("<<: {models: 1}\nmodels: 2")
@example("~: 1")
def test_any_text_is_a_policy_or_a_policy_error(text: str):
    for fault in faults(text):
        assert re.match(r"p\.yaml:\d+: .", fault), fault


@quick
@given(st.integers(0, len(TEXT) - 1), st.text(max_size=3))
def test_a_slip_of_the_pen_is_told_with_a_line(position: int, slip: str):
    told = ""
    try:
        parse_policy(TEXT[:position] + slip + TEXT[position + 1 :], "p.yaml")
    except PolicyError as error:
        told = str(error)
    assert not told or all(re.match(r"p\.yaml:\d+: .", line) for line in told.split("\n"))
