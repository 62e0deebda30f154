"""What an audit finds, verdict by verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

T = TypeVar("T")
Name = Literal["integrity", "append-only", "completeness", "payloads", "freshness"]
NAMES: tuple[Name, ...] = ("integrity", "append-only", "completeness", "payloads", "freshness")
SHOWN = 20  # faults of a verdict; the rest is counted


@dataclass(slots=True)
class Verdict:
    """note: what was looked at. faults: the first SHOWN; count: of all."""

    note: str = ""
    faults: list[str] = field(default_factory=list[str])
    count: int = 0

    @property
    def holds(self) -> bool:
        return not self.count

    def fault(self, text: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.faults.append(text)

    def guarded(self, what: str, work: Callable[[], T]) -> T | None:
        """What cannot even be read is a fault like any other."""
        try:
            return work()
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
            detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self.fault(f"{what} cannot be read: {detail}")
        return None


Report = dict[Name, Verdict]
