"""A provider that fails is left alone for a while: circuit breaking, for each tenant, provider and model apart.

    closed      every call goes through; FAILURES failures in a row open it
    open        no call goes through, for FIRST_S seconds, twice as long after each trial that failed, up to MOST_S
    half open   one call goes through, the trial; others are refused until it has ended; what comes of it decides

A failure is what says that the provider cannot serve now: 429, 5xx, no connection, and a time-out that was long enough
to be the provider's fault. A refusal (400, 401) is none, nor is a busy provider that may be asked again at once
(`retry_after` 0), or a short time-out of one's own. What makes a provider fail may be what one tenant asks of it, so
each tenant has circuits of its own: nobody can close a model to others, nor hold the one trial that would open it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.core.errors import ProviderBusy

FAILURES = 5  # in a row, of all queries of a tenant: fewer are chance, more are retries in vain
FIRST_S = 2.0  # what a provider that restarts, or a limit by the second, takes
MOST_S = 60.0  # limits by the minute are over then; and a provider that is back is noticed within it
TRIAL_S = 1.0  # when to ask again while a trial is under way: it may end at any time


@dataclass(slots=True)
class _State:
    """open_until: on the clock; None while closed. trial: whether one is under way."""

    failures: int = 0
    open_s: float = 0.0
    open_until: float | None = None
    trial: bool = False


class Circuit:
    """Of one event loop. A key is dropped as soon as all is well with it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[Hashable, _State] = {}

    @contextmanager
    def attempt(self, key: Hashable) -> Generator[None]:
        """Around one call: `check` before it, and after it the place of a trial that told nothing is free again.

        What came of the call is told inside, by `succeeded` or `failed`, or by neither: cancelled, refused.
        """
        trial = self.check(key)
        try:
            yield
        finally:
            if trial:
                self.free(key)

    def is_open(self, key: Hashable) -> bool:
        state = self._states.get(key)
        return state is not None and state.open_until is not None and state.open_until > self._clock()

    def check(self, key: Hashable) -> bool:
        """Whether this call is the trial, which has to end in `succeeded`, `failed` or `free`. Raises ProviderBusy."""
        state = self._states.get(key)
        if state is None or state.open_until is None:
            return False
        left = state.open_until - self._clock()
        if left > 0 or state.trial:
            again = max(left, TRIAL_S) if state.trial else left
            text = f"the provider failed {state.failures} times in a row: it is left alone for {again:.0f} s more"
            raise ProviderBusy(text, retry_after=again)
        state.trial = True
        return True

    def free(self, key: Hashable) -> None:
        """The trial ended, and told nothing: the next call is one. Nothing where it did tell."""
        if state := self._states.get(key):
            state.trial = False

    def succeeded(self, key: Hashable) -> None:
        self._states.pop(key, None)

    def failed(self, key: Hashable) -> None:
        state = self._states.setdefault(key, _State())
        if state.open_until is not None and not state.trial:
            return  # sent before it opened: no news
        state.failures += 1
        if state.trial or state.failures >= FAILURES:
            state.trial = False
            state.open_s = min(MOST_S, state.open_s * 2 or FIRST_S)
            state.open_until = self._clock() + state.open_s
