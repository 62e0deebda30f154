"""What the nodes of a query run on, and what one of them is to do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal

from orchestrator.core.context import Context
from orchestrator.core.policy import Policy
from orchestrator.core.turns import Turns
from orchestrator.loop.prompts import RootLimits
from orchestrator.proxy.proxy import Proxy
from orchestrator.sandbox.base import Backend, SandboxSpec, Slot
from orchestrator.sandbox.sandbox import Sandbox

ContextForm = Literal["text", "jsonl"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What nodes run on. places: for sandboxes, one gate a level: who waits for a child has a place of its own.

    keep_context: stores a context that was made in a REPL; blocks, and raises ContextError, StoreError. open_context:
    finds one again by its id, and raises the same. limits: what the LM behind a model's name can take under a policy.
    """

    proxy: Proxy
    backend: Backend
    open_sandbox: Callable[[Callable[[Slot], SandboxSpec]], AbstractAsyncContextManager[Sandbox]]
    verify: Callable[[Context], bool]
    keep_context: Callable[[ContextForm, Sequence[str]], Context]
    open_context: Callable[[str], Context]
    limits: Callable[[str, Policy], RootLimits]
    places: Callable[[int], Turns]


@dataclass(frozen=True, slots=True)
class Work:
    """What one node is to do. code: run as one cell instead of an LM's loop (`airlock exec`); model is empty then.

    models: what is asked at each depth, the last one at all further down; the first is this node's own. inherited: the
    context is that of the parent, who looks after it.
    """

    question: str
    context: Context
    models: Sequence[str]
    accept: Callable[[str], Awaitable[str | None]]
    code: str | None = None
    on_output: Callable[[str, str], None] | None = None
    inherited: bool = False

    @property
    def model(self) -> str:
        return self.models[0]
