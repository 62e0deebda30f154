"""Is each payload that is kept what was recorded, and was each that is not erased on record, or never kept?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.audit.evidence import Evidence
from orchestrator.audit.verdicts import Verdict
from orchestrator.core.events import commitment


@dataclass(slots=True)
class Committed:
    """What a query's records say of its payloads, so far."""

    tenant: str
    by_place: dict[tuple[int, str], Mapping[str, Any]] = field(  # number of the record, name -> commitment, kept
        default_factory=dict[tuple[int, str], Mapping[str, Any]]
    )
    is_checked: bool = False


class Payloads:
    def __init__(self, evidence: Evidence, verdict: Verdict) -> None:
        self._evidence = evidence
        self._verdict = verdict
        self._erased: set[tuple[str, int | None, str | None]] = set()
        self._missing: list[tuple[str, int, str]] = []  # that were kept once
        self._matching = self._never = 0

    def erase(self, query: str, seq: int | None, name: str | None) -> None:
        """As a record says. None: of all records, of all names."""
        self._erased.add((query, seq, name))

    def check(self, query: str, committed: Committed) -> None:
        """When its chain is at its end, so that not all records have to be remembered."""
        said_of, committed.by_place, committed.is_checked = committed.by_place, {}, True
        for seq, name, opened in self._evidence.payloads(committed.tenant, query):
            said = said_of.pop((seq, name), None)
            if said is None:
                self._verdict.fault(f"query {query}: payload {name} of record {seq} was never recorded")
            elif opened is None or said["commitment"] != commitment(*opened):
                self._verdict.fault(f"query {query}: payload {name} of record {seq} is not what was recorded")
            else:
                self._matching += 1
        for (seq, name), said in said_of.items():
            if said["kept"]:
                self._missing.append((query, seq, name))
            else:
                self._never += 1

    def finish(self, queries: Mapping[str, Committed]) -> None:
        """After the last record: what was not checked yet, and what was erased."""
        for query, committed in queries.items():
            if not committed.is_checked:
                self.check(query, committed)
        lost = 0
        for query, seq, name in self._missing:
            if not self._is_erased(query, seq, name):
                self._verdict.fault(f"query {query}: payload {name} of record {seq} is missing, and was not erased")
                lost += 1
        for query in {query for query, _seq, _name in self._erased}:
            committed = queries.get(query)
            for seq, name, _opened in self._evidence.payloads(committed.tenant, query) if committed else ():
                if self._is_erased(query, seq, name):
                    self._verdict.fault(f"query {query}: payload {name} of record {seq} was erased, and is here")
        erased = len(self._missing) - lost
        self._verdict.note = f"{self._matching:,} match, {erased:,} erased, {self._never:,} never kept"

    def _is_erased(self, query: str, seq: int, name: str) -> bool:
        return not self._erased.isdisjoint([(query, None, None), (query, seq, None), (query, seq, name)])
