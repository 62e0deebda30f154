"""A model that says what a file tells it to: for tests, documentation and `make demo SCRIPTED=1`.

The file is YAML. `root` is the list of replies to a conversation, one a turn, the last one repeated; a conversation is
known by its system message. `sub` answers all other requests: a list of `{match: REGEX, reply: TEXT}`, the first match
wins; `\\1` and `\\g<name>` in the reply are taken from the match. `delay_s` comes before every reply. Four characters
count as a token.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import anyio
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.core.errors import ModelError, OutcomeUnknown
from orchestrator.files import Unreadable, read_text
from orchestrator.lm.base import LM, Reply, Request, Usage


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid")

    match: str
    reply: str


class _Script(BaseModel):
    model_config = ConfigDict(extra="forbid")

    root: Annotated[list[str], Field(min_length=1)]
    sub: list[_Rule] = []
    delay_s: Annotated[float, Field(ge=0, le=3600)] = 0.0


def _compiled(rule: _Rule) -> tuple[re.Pattern[str], str]:
    """Raises re.error, or IndexError for a reply that names a group which the pattern has not."""
    pattern = re.compile(rule.match, re.DOTALL)
    re.compile(f"(?:{rule.match})|", re.DOTALL).sub(rule.reply, "")  # the empty alternative always matches
    return pattern, rule.reply


def _in_a_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc'])) or 'its top'}: {fault['msg']}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:200]


class ScriptedLM(LM):
    """Raises ModelError when the file is not a script."""

    def __init__(self, path: Path) -> None:
        try:
            self._script = _Script.model_validate(yaml.safe_load(read_text(path)))
            self._rules = [_compiled(rule) for rule in self._script.sub]
        except Unreadable as why:
            raise ModelError(f"cannot read the script {path}: {why}") from None
        except (yaml.YAMLError, ValidationError, re.error, IndexError, RecursionError) as error:
            raise ModelError(f"{path} is not a script for a model: {_in_a_line(error)}") from None

    async def ask(self, request: Request) -> Reply:
        if self._script.delay_s >= request.timeout_s:
            await anyio.sleep(request.timeout_s)
            raise OutcomeUnknown(f"the script did not answer within {request.timeout_s:.0f} s")
        await anyio.sleep(self._script.delay_s)
        text = self._say(request)
        cut = text[: request.max_output_tokens * 4]
        prompt = sum(len(message["content"]) for message in request.messages)
        usage = Usage(prompt // 4 + 1, len(cut) // 4 + 1)
        return Reply(cut, "length" if len(cut) < len(text) else "stop", usage)

    def _say(self, request: Request) -> str:
        if request.messages[0]["role"] == "system":
            turn = sum(message["role"] == "assistant" for message in request.messages)
            return self._script.root[min(turn, len(self._script.root) - 1)]
        prompt = request.messages[-1]["content"]
        for pattern, reply in self._rules:
            if found := pattern.search(prompt):
                return found.expand(reply)
        return "The script has no reply to this."

    async def aclose(self) -> None:
        """Nothing is held."""
