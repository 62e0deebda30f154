"""Places shared by weight: none is lost, none is taken twice, and nobody waits behind another's backlog."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.turns import Turns
from tests.unit.helpers import quick

pytestmark = pytest.mark.anyio


async def settled() -> None:
    """Until every task waits again: a place changes hands within a few rounds of the event loop, with no I/O in it."""
    for _ in range(8):
        await anyio.lowlevel.checkpoint()


class Hall:
    """Calls that hold their place until they are told to leave. served: who, in the order in which they got it."""

    def __init__(self, capacity: int, tasks: anyio.abc.TaskGroup) -> None:
        self.turns = Turns(capacity)
        self.served: list[str] = []
        self.inside: list[tuple[str, anyio.Event]] = []
        self._tasks = tasks

    def come(self, who: str, weight: int = 1, most: int | None = None, times: int = 1) -> list[anyio.CancelScope]:
        scopes = [anyio.CancelScope() for _ in range(times)]
        for scope in scopes:
            self._tasks.start_soon(self._call, who, weight, most, scope)
        return scopes

    async def _call(self, who: str, weight: int, most: int | None, scope: anyio.CancelScope) -> None:
        with scope:
            async with self.turns.turn(who, weight, most):
                self.served.append(who)
                mine = (who, anyio.Event())
                self.inside.append(mine)
                try:
                    await mine[1].wait()
                finally:
                    self.inside.remove(mine)

    def leave(self, number: int = 0) -> None:
        self.inside[number][1].set()

    async def empty(self) -> None:
        """Let all who have come have their turn."""
        await settled()
        while self.inside:
            self.leave()
            await settled()
        assert (self.turns.running, self.turns.waiting, self.turns._known, self.turns._heap) == (0, {}, {}, [])


async def test_no_more_than_there_are_places_and_in_order():
    turns = Turns(2)
    running, most, order = 0, 0, []

    async def call(number: int) -> None:
        nonlocal running, most
        async with turns.turn("a", 1):
            order.append(number)
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(call, number)
    assert (most, order) == (2, list(range(20)))


async def test_a_free_place_is_taken_without_waiting():
    turns = Turns(2)
    with anyio.CancelScope() as scope:
        scope.cancel()  # whatever waits is cancelled
        async with turns.turn("a", 1), turns.turn("a", 1):
            assert turns.running == 2
    assert not scope.cancelled_caught


async def test_of_one_who_no_more_than_its_most():
    async with anyio.create_task_group() as tasks:
        hall = Hall(10, tasks)
        hall.come("a", most=3, times=8)
        hall.come("b", times=4)
        await settled()
        assert Counter(hall.served) == {"a": 3, "b": 4}
        assert hall.turns.waiting == {"a": 5}
        hall.leave(hall.served.index("b"))  # a place of another's is none for it
        await settled()
        assert Counter(hall.served) == {"a": 3, "b": 4}
        hall.leave(0)
        await settled()
        assert Counter(hall.served) == {"a": 4, "b": 4}
        await hall.empty()


async def test_the_newest_word_on_the_most_counts():
    async with anyio.create_task_group() as tasks:
        hall = Hall(2, tasks)
        hall.come("a", most=3, times=3)
        await settled()
        hall.come("a", most=1)
        hall.come("b")
        await settled()
        hall.leave()
        await settled()
        hall.leave([who for who, _ in hall.inside].index("b"))
        await settled()
        assert hall.served == ["a", "a", "b"]
        assert hall.turns.running == 1
        await hall.empty()


@pytest.mark.parametrize("weights", [(1, 1), (1, 100), (100, 1)])
async def test_a_single_call_does_not_wait_behind_a_backlog(weights: tuple[int, int]):
    """The next place is its own, however many wait and whatever they weigh."""
    async with anyio.create_task_group() as tasks:
        hall = Hall(4, tasks)
        hall.come("heavy", weights[0], times=1000)
        await settled()
        for _ in range(100):
            hall.leave()
            await settled()
        hall.come("light", weights[1])
        await settled()
        hall.leave()
        await settled()
        assert hall.served[-1] == "light"
        tasks.cancel_scope.cancel()


async def test_who_comes_one_by_one_gets_no_more_than_its_share():
    """What it owes is not forgotten while it is away: else one call at a time would weigh as much as any backlog."""
    async with anyio.create_task_group() as tasks:
        hall = Hall(1, tasks)
        hall.come("heavy", 10, times=200)
        await settled()
        for _ in range(110):
            hall.leave()
            await settled()
            if "light" not in hall.turns.waiting and hall.inside[0][0] != "light":
                hall.come("light", 1)
                await settled()
        assert 9 <= hall.served.count("light") <= 12
        tasks.cancel_scope.cancel()


async def test_nothing_is_saved_up():
    """Ten turns alone, or none at all: from when both wait, they share."""
    async with anyio.create_task_group() as tasks:
        hall = Hall(1, tasks)
        hall.come("a", times=50)
        await settled()
        for _ in range(9):
            hall.leave()
            await settled()
        hall.come("b", times=20)
        await settled()
        for _ in range(20):
            hall.leave()
            await settled()
        assert Counter(hall.served[10:]) == {"a": 10, "b": 10}
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("by_task", [False, True])
async def test_a_place_that_was_given_to_one_who_is_cancelled_at_that_instant_goes_on(by_task: bool):
    turns = Turns(1)
    served: list[str] = []
    scopes: list[anyio.CancelScope] = []

    async def call(name: str) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            async with turns.turn(name, 1):
                served.append(name)

    async with turns.turn("first", 1):
        waiting = [asyncio.create_task(call(name)) for name in ("cancelled", "next")]
        await settled()
    assert turns.running == 1  # of the one that has not run since
    if by_task:
        waiting[0].cancel()
    else:
        scopes[0].cancel()
    await asyncio.wait(waiting)
    # A scope lets the task see its place before it ends; a task's `cancel` does not.
    assert served == (["next"] if by_task else ["cancelled", "next"])
    assert (turns.running, turns._known) == (0, {})


async def test_ten_thousand_wait_and_nothing_is_left_of_them():
    async with anyio.create_task_group() as tasks:
        hall = Hall(8, tasks)
        for number in range(10):
            hall.come(f"who {number}", 1 + number, times=1000)
        await settled()
        assert sum(hall.turns.waiting.values()) == 10_000 - 8
        for _ in range(1000):
            for _, event in hall.inside:
                event.set()
            await settled()
        assert len(hall.served) >= 8000
        tasks.cancel_scope.cancel()
    assert (hall.turns.running, hall.turns._known) == (0, {})


async def test_who_comes_and_goes_leaves_nothing():
    turns = Turns(1)

    async def cancelled(number: int) -> None:
        with anyio.move_on_after(0):
            async with turns.turn(f"who {number % 7}", 1):
                raise AssertionError("the place is taken")

    async with turns.turn("first", 1):
        for number in range(5000):
            await cancelled(number)
        assert turns.waiting == {}
        assert len(turns._known) <= 8
        assert len(turns._heap) <= 8
    assert turns._known == {}


@pytest.mark.parametrize(("weight", "most"), [(0, None), (-1, None), (1, 0)])
async def test_who_would_never_have_a_turn_is_told_so(weight: int, most: int | None):
    with pytest.raises(ValueError, match="never have a turn"):
        async with turns_of_one().turn("a", weight, most):
            pass
    with pytest.raises(ValueError, match="nobody"):
        Turns(0)


def turns_of_one() -> Turns:
    return Turns(1)


# Properties


@quick
@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=2),
    st.integers(1, 5),
    st.lists(st.integers(0, 4), min_size=60, max_size=120),
)
def test_shares_are_within_a_turn_of_the_weights(weights: dict[str, int], capacity: int, leaving: list[int]):
    """Over any interval in which all wait, whoever leaves when: within one turn of each, the least there can be."""

    async def run() -> Sequence[str]:
        async with anyio.create_task_group() as tasks:
            hall = Hall(capacity, tasks)
            for who, weight in weights.items():
                hall.come(who, weight, times=len(leaving) + capacity)
            await settled()
            for number in leaving:
                hall.leave(number % len(hall.inside))
                await settled()
            tasks.cancel_scope.cancel()
        return hall.served

    served = anyio.run(run)
    served = served[capacity:]  # the first ones found free places
    counts = [Counter(served[:end]) for end in range(len(served) + 1)]
    for (first, one), (second, other) in itertools.combinations(weights.items(), 2):
        for start, end in itertools.combinations(range(0, len(served) + 1, 5), 2):
            mine = (counts[end][first] - counts[start][first]) / one
            theirs = (counts[end][second] - counts[start][second]) / other
            assert abs(mine - theirs) <= 1 / one + 1 / other + 1e-9


steps = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.sampled_from("abc"), st.integers(1, 4), st.none() | st.integers(1, 3)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 99)),
        st.tuples(st.just("leave and cancel"), st.integers(0, 9), st.integers(0, 99)),
        st.tuples(st.just("settle")),
    ),
    max_size=60,
)


@settings(quick, max_examples=100)
@given(st.integers(1, 4), steps)
def test_no_place_is_lost_or_taken_twice(capacity: int, steps: list[tuple[str | int | None, ...]]):
    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            hall = Hall(capacity, tasks)
            scopes: list[anyio.CancelScope] = []
            for step, *values in steps:
                if step == "come":
                    who, weight, most = values
                    scopes += hall.come(str(who), int(weight or 1), most)  # pyright: ignore[reportArgumentType]
                if step in ("leave", "leave and cancel") and hall.inside:
                    hall.leave(int(values[0] or 0) % len(hall.inside))
                if step in ("cancel", "leave and cancel") and scopes:
                    scopes.pop(int(values[-1] or 0) % len(scopes)).cancel()
                if step == "settle":
                    await settled()
                assert hall.turns.running <= capacity
            await settled()
            assert len(hall.inside) == hall.turns.running <= capacity
            if hall.turns.running < capacity:  # who waits then has all that it may have
                for name in hall.turns.waiting:
                    who = hall.turns._known[name]
                    assert who.running >= who.most
            await hall.empty()

    anyio.run(run)
