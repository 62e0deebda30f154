"""A provider that fails is left alone, tried by one call at a time, and used again as soon as it works."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.errors import ProviderBusy
from orchestrator.proxy.circuit import FAILURES, FIRST_S, MOST_S, Circuit
from tests.unit.helpers import quick

KEY = ("https://lm.test/v1", "m")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    return Circuit(clock)


def refused(circuit: Circuit, key: object = KEY) -> float | None:
    """Seconds until it may be asked again, or None where the call goes through (and is no trial)."""
    try:
        trial = circuit.check(key)
    except ProviderBusy as busy:
        return busy.retry_after
    assert not trial
    return None


def opened(circuit: Circuit) -> None:
    for _ in range(FAILURES):
        assert refused(circuit) is None
        circuit.failed(KEY)


def test_it_opens_after_so_many_failures_in_a_row(circuit: Circuit):
    for _ in range(3):
        for _ in range(FAILURES - 1):
            circuit.failed(KEY)
        assert refused(circuit) is None
        circuit.succeeded(KEY)
    opened(circuit)
    assert refused(circuit) == FIRST_S


def test_other_providers_and_models_go_on(circuit: Circuit):
    opened(circuit)
    assert refused(circuit, (KEY[0], "other")) is None
    assert refused(circuit, ("https://other.test", KEY[1])) is None


def test_it_says_how_long_it_is_still_closed_to_calls(circuit: Circuit, clock: Clock):
    opened(circuit)
    clock.now += FIRST_S - 0.5
    assert refused(circuit) == pytest.approx(0.5)


def test_one_call_tries_and_the_others_wait_for_it(circuit: Circuit, clock: Clock):
    opened(circuit)
    clock.now += FIRST_S
    assert circuit.check(KEY)
    clock.now += 3600  # a trial may take long
    assert refused(circuit)
    circuit.succeeded(KEY)
    assert refused(circuit) is None


def test_each_trial_that_fails_doubles_the_time_up_to_a_cap(circuit: Circuit, clock: Clock):
    opened(circuit)
    seen: list[float] = []
    for _ in range(8):
        seen.append(refused(circuit) or 0)
        clock.now += seen[-1]
        assert circuit.check(KEY)
        circuit.failed(KEY)
    assert seen == [min(MOST_S, FIRST_S * 2**n) for n in range(8)]
    clock.now += MOST_S
    assert circuit.check(KEY)
    circuit.succeeded(KEY)
    opened(circuit)
    assert refused(circuit) == FIRST_S  # it begins anew


def test_calls_that_were_sent_before_it_opened_do_not_lengthen_it(circuit: Circuit):
    opened(circuit)
    for _ in range(64):
        circuit.failed(KEY)
    assert refused(circuit) == FIRST_S


def test_a_success_from_before_closes_it(circuit: Circuit):
    opened(circuit)
    circuit.succeeded(KEY)
    assert refused(circuit) is None


def test_nothing_is_kept_of_what_works(circuit: Circuit):
    for number in range(100):
        circuit.check(number)
        circuit.failed(number)
        circuit.succeeded(number)
    assert circuit._states == {}


def test_a_trial_that_tells_nothing_frees_its_place(circuit: Circuit, clock: Clock):
    opened(circuit)
    clock.now += FIRST_S
    for _ in range(3):
        with circuit.attempt(KEY):
            assert refused(circuit)
    assert circuit.check(KEY)


def test_an_earlier_call_that_tells_nothing_does_not_free_the_place_of_a_trial(circuit: Circuit, clock: Clock):
    with circuit.attempt(KEY):
        opened(circuit)
        clock.now += FIRST_S
        assert circuit.check(KEY)
    assert refused(circuit)


@pytest.mark.anyio
async def test_of_many_calls_at_once_one_is_the_trial_and_the_next_one_when_it_is_cancelled(
    circuit: Circuit, clock: Clock
):
    opened(circuit)
    clock.now += FIRST_S
    under_way: list[anyio.CancelScope] = []
    refusals = 0

    async def call() -> None:
        nonlocal refusals
        try:
            with anyio.CancelScope() as scope, circuit.attempt(KEY):
                under_way.append(scope)
                await anyio.sleep_forever()
        except ProviderBusy:
            refusals += 1

    for wave in range(1, 4):
        async with anyio.create_task_group() as tasks:
            for _ in range(64):
                tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            assert (len(under_way), refusals) == (wave, 63 * wave)
            under_way[-1].cancel()


@quick
@given(st.lists(st.sampled_from(["ask", "good", "bad", "cancel", "wait"]), max_size=200))
def test_there_is_never_more_than_one_trial_and_always_one_in_the_end(steps: list[str]):
    clock = Clock()
    circuit = Circuit(clock)
    trials = plain = 0  # calls under way
    for step in steps:
        if step == "wait":
            clock.now += FIRST_S
        elif step == "ask":
            try:
                trial = circuit.check(KEY)
            except ProviderBusy:
                continue
            trials, plain = trials + trial, plain + (not trial)
        elif step == "cancel" and trials:
            circuit.free(KEY)
            trials = 0
        elif step in ("good", "bad") and trials + plain:
            (circuit.succeeded if step == "good" else circuit.failed)(KEY)
            trials, plain = 0, plain - (not trials)  # a trial's end, where there is one
        assert trials <= 1
    clock.now += MOST_S
    if not trials:
        circuit.check(KEY)  # goes through, whatever was before
