"""Places that many share by weight: start-time fair queueing (Goyal, Vin and Cheng, 1996), a turn being the unit.

Each turn of a `who` starts, on a virtual clock, where its last one ended, and lasts 1/weight; the free place goes to
the earliest start, and the clock then shows that start. So whoever always has calls waiting gets places in proportion
to its weight. A newcomer starts at the clock: it neither waits behind what others have queued, nor has it saved up
anything while it was away. Nor is it rid of what it owes, when it comes back before its last turn has ended there.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio


@dataclass(slots=True, eq=False)
class _Waiter:
    """given: it has its place, whether or not its task has run since. event: made when it has to wait."""

    given: bool = False
    event: anyio.Event | None = None


@dataclass(slots=True)
class _Who:
    """end: of its last turn, on the virtual clock. listed: it has its entry in the heap."""

    name: str
    weight: int = 1
    most: float = math.inf
    running: int = 0
    waiting: OrderedDict[_Waiter, None] = field(default_factory=OrderedDict[_Waiter, None])
    end: float = 0.0
    listed: bool = False


class Turns:
    """At most `capacity` turns at once. Of one event loop; O(log n) a turn, n being how many there are to share."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a capacity of {capacity}: nobody would ever have a turn")
        self.capacity = capacity
        # Places are not taken back: were all of them one's, whose turns are long, a share would be worth nothing.
        self.most_of_one = max(1, capacity * 3 // 4)
        self.running = 0
        self._clock = 0.0
        self._known: dict[str, _Who] = {}
        # One entry at most for each who: its next turn's start. One with nothing waiting stays until the clock gets
        # there: that is how long it is remembered what it owes.
        self._heap: list[tuple[float, int, _Who]] = []
        self._order = itertools.count()  # of equal starts, the first to be listed is the first to be served

    @asynccontextmanager
    async def turn(self, who: str, weight: int, most: int | None = None) -> AsyncGenerator[None]:
        """Wait for a place, and have it. most: turns of this who at once; with its weight, the newest word counts."""
        if weight < 1 or (most is not None and most < 1):
            raise ValueError(f"weight {weight}, at most {most}: {who} would never have a turn")
        await self._enter(who, weight, math.inf if most is None else most)
        try:
            yield
        finally:
            self._leave(self._known[who])

    @property
    def waiting(self) -> dict[str, int]:
        """who -> how many calls wait, of those who wait at all."""
        return {name: len(who.waiting) for name, who in self._known.items() if who.waiting}

    async def _enter(self, name: str, weight: int, most: float) -> None:
        who = self._known.setdefault(name, _Who(name))
        who.weight, who.most = weight, most
        waiter = _Waiter()
        who.waiting[waiter] = None
        self._list(who)
        self._serve()
        if waiter.given:
            return
        waiter.event = anyio.Event()
        try:
            await waiter.event.wait()
        except BaseException:  # cancelled, by a scope or by a task's `cancel`
            if waiter.given:  # at the same instant: it goes to the next one
                self._leave(who)
            else:
                del who.waiting[waiter]  # its entry in the heap is found empty when it comes up
            raise

    def _leave(self, who: _Who) -> None:
        self.running -= 1
        who.running -= 1
        if who.waiting:
            self._list(who)
        self._serve()
        self._forget(who)

    def _list(self, who: _Who) -> None:
        if not who.listed and who.running < who.most:
            who.listed = True
            heapq.heappush(self._heap, (max(self._clock, who.end), next(self._order), who))

    def _serve(self) -> None:
        while self._heap and self.running < self.capacity:
            start, _, who = heapq.heappop(self._heap)
            who.listed = False
            if who.waiting and who.running < who.most:
                waiter, _ = who.waiting.popitem(last=False)
                self._clock = start
                who.end = start + 1 / who.weight
                who.running += 1
                self.running += 1
                waiter.given = True
                if waiter.event:
                    waiter.event.set()
                self._list(who)
            else:
                self._forget(who)

    def _forget(self, who: _Who) -> None:
        if not (who.listed or who.running or who.waiting):
            self._known.pop(who.name, None)
            if not self._known:
                self._clock = 0.0  # nobody owes anything: numbers begin anew, and stay exact
