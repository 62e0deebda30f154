"""What every benchmark hands back, and the arithmetic of runs. Times in seconds unless a name says otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: what was measured, what stands beside it, and the target.

    measured, beside: with their units. ratio: measured over beside, None where nothing is compared. ok: None where no
    target is set.
    """

    name: str
    measured: str
    beside: str = ""
    ratio: float | None = None
    target: str = ""
    ok: bool | None = None


def versus(name: str, ours: list[float], label: str, theirs: list[float], most: float) -> Figure:
    """Medians of two lists of seconds, and their ratio, which may be `most`."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    ratio = mine / other
    return Figure(name, spread(ours), f"{label} {ms(other)}", ratio, f"<= {most:g}x", ratio <= most)


def at_most(name: str, seconds: list[float], most: float) -> Figure:
    """Their median, which may be `most`."""
    middle = percentile(seconds, 50)
    measured = f"p50 {ms(middle)}, p95 {ms(percentile(seconds, 95))}"
    return Figure(name, measured, target=f"p50 <= {ms(most)}", ok=middle <= most)


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def spread(seconds: list[float]) -> str:
    """'median (least to most)'"""
    return f"{ms(statistics.median(seconds))} ({ms(min(seconds))} to {ms(max(seconds))})"


def percentile(seconds: list[float], percent: int) -> float:
    """By nearest rank."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def interleaved(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Each measure once a round, the first round thrown away: what disturbs the machine disturbs all of them."""
    taken: list[list[float]] = [[] for _ in measures]
    for number in range(rounds + 1):
        for values, measure in zip(taken, measures, strict=True):
            value = measure()
            if number:
                values.append(value)
    return taken


def missed(figures: Iterable[Figure]) -> list[str]:
    return [figure.name for figure in figures if figure.ok is False]
