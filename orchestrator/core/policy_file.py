"""Policy files: YAML in, a `Policy` or errors that name the line out; and a `Policy` as a file has it."""

from __future__ import annotations

from typing import Any, cast

import yaml
from pydantic import ValidationError

from orchestrator.core.errors import PolicyError
from orchestrator.core.policy import Policy
from orchestrator.core.units import shortest

# What is wrong with a value, in a file's words and not in Python's; {} is filled from the fault's own figures.
_PLAIN = {
    "extra_forbidden": "is not a key of policies; policies/README.md lists them",
    "invalid_key": "is not a key of policies; policies/README.md lists them",
    "missing": "is missing",
    "model_type": "has to be a mapping of keys",
    "too_short": "must not be empty",
    "too_long": "has to have {max_length} parts at most",
    "tuple_type": "has to be a list of names",
    "string_type": "has to be a name, in quotes where it looks like something else",
    "int_type": "has to be a whole number",
    "bool_type": "has to be true or false",
    "literal_error": "has to be {expected}",
    "greater_than": "has to be more than {gt}",
    "greater_than_equal": "has to be at least {ge}",
    "less_than_equal": "has to be {le} at most",
}


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML's binding of libyaml, where it was built with it
_DEEPEST = 20
MAX_CHARS = 1 << 16


def parse_policy(text: str, name: str) -> Policy:
    """The policy in `text`. Raises PolicyError: one line for each fault, `name:line: key: what is wrong`."""
    if len(text) > MAX_CHARS:
        raise PolicyError(f"{name}:1: has {len(text):,} characters; a policy has {MAX_CHARS:,} at most")
    root, values = _read(text, name)
    faults = _duplicates(root, name)
    try:
        policy = Policy.model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            where = tuple(str(part) for part in fault["loc"] if part != "[key]")
            plain = _PLAIN.get(fault["type"], fault["msg"].removeprefix("Value error, "))
            message = plain.format_map(fault.get("ctx", {})) if fault["type"] in _PLAIN else plain
            faults.append(f"{name}:{_line(root, where)}: {'.'.join(where)}: {message}")
        raise PolicyError("\n".join(dict.fromkeys(faults))) from None
    if faults:
        raise PolicyError("\n".join(faults))
    return policy


def policy_values(policy: Policy) -> dict[str, dict[str, Any]]:
    """The policy as its file would be read: quantities in the units that people write, one list of patterns as one."""
    written: dict[str, dict[str, Any]] = policy.model_dump(mode="json")
    for section in written.values():
        for key, value in section.items():
            section[key] = shortest(value) if isinstance(value, str) else value
    for key in ("root", "sub"):
        lists = written["models"][key]
        written["models"][key] = lists[0] if len(lists) == 1 else lists
    return written


def policy_text(policy: Policy) -> str:
    """YAML of which `parse_policy` makes the same policy."""
    return yaml.safe_dump(policy_values(policy), sort_keys=False, allow_unicode=True, default_flow_style=None)


def _read(text: str, name: str) -> tuple[yaml.MappingNode, Any]:
    try:
        _refuse_tricks(text)
        loader = _Loader(text)
        root: Any = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode) or root.tag != "tag:yaml.org,2002:map":
            raise PolicyError(f"{name}:1: a policy is a mapping of sections; see policies/default.yaml")
        return root, loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PolicyError(f"{name}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise PolicyError(f"{name}:1: not YAML: {str(error).splitlines()[0]}") from None
    # The library's own faults on values such as `!!bool x`: KeyError, AttributeError and more, all without a line.
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise PolicyError(f"{name}:1: not YAML: a value cannot be read ({type(error).__name__})") from None


def _refuse_tricks(text: str) -> None:
    """Aliases, of which a few lines can stand for gigabytes, and nesting that no recursion survives."""
    depth = 0
    for event in cast("Any", yaml.parse(text, Loader=_Loader)):
        mark: Any = event.start_mark
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="a policy has no aliases", problem_mark=mark)
        if depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=mark)


def _duplicates(node: Any, name: str) -> list[str]:
    # YAML keeps the last of two equal keys: a limit could be hidden by one further down.
    faults: list[str] = []
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            faults.append(f"{name}:{key.start_mark.line + 1}: {key.value}: is there twice")
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode):
            faults += _duplicates(value, name)
    return faults


def _line(node: Any, where: tuple[str, ...]) -> int:
    """The line of the deepest key of `where` that is in the file."""
    line = 1
    for part in where:
        found = next((pair for pair in node.value if pair[0].value == part), None) if _is_map(node) else None
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return int(line)


def _is_map(node: Any) -> bool:
    return isinstance(node, yaml.MappingNode)
