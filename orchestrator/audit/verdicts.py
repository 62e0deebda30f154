"""What an audit finds, verdict by verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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


Report = dict[Name, Verdict]
