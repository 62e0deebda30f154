"""A process that kills itself, as `kill -9` would: at its n-th step, or after a time.

A step is a moment before or after a commit, a frame of the channel, or a request to a model: whatever lies between two
of them is all that an orchestrator does.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.lm.openai import OpenAILM
from orchestrator.sandbox.channel import Channel
from orchestrator.store.db import Database


def doom(at: int | None = None, after_s: float | None = None, count: str | None = None) -> None:
    """at: the step. after_s: from now. count: a file that gets the number of steps when the process ends in order."""
    steps = itertools.count(1)
    if after_s is not None:
        timer = threading.Timer(after_s, die)
        timer.daemon = True
        timer.start()
    if count is not None:
        atexit.register(lambda: Path(count).write_text(str(next(steps) - 1)))

    def step() -> None:
        if next(steps) == at:
            die()

    commit: Any = Database._commit

    def doomed_commit(self: Database, batch: Any) -> None:
        step()
        commit(self, batch)
        step()

    Database._commit = doomed_commit
    for owner, name in ((Channel, "send"), (Channel, "receive"), (OpenAILM, "ask")):
        setattr(owner, name, _doomed(getattr(owner, name), step))


def _doomed(method: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    async def doomed(*given: Any) -> Any:
        step()
        result = await method(*given)
        step()
        return result

    return doomed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
