"""Does each record go on from the one before it in its chain, and is there all that should be: records, calls, queries?

Of a query that has ended a few numbers are remembered, of one that goes on its commitments.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.audit.evidence import Entry, Evidence
from orchestrator.audit.money import Spent
from orchestrator.audit.payloads import Committed, Payloads
from orchestrator.audit.verdicts import Report
from orchestrator.core.events import GENESIS, MOST_BYTES
from orchestrator.core.units import read_usd

PLATFORM = "platform"
TENANTS = "tenants/"


@dataclass(slots=True)
class Chain:
    """A query as far as its records were read."""

    tenant: str
    committed: Committed
    length: int = 0
    head: str = GENESIS
    ended: str = ""  # the status that it was closed with, or `interrupted`
    paid: Spent = field(default_factory=lambda: Spent(""))
    waiting: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])  # call -> attempt, bound


class Chains:
    """Of all queries. heads: log -> size -> root, as the platform's log has them. records: how many were read."""

    def __init__(self, evidence: Evidence, payloads: Payloads, report: Report) -> None:
        self._evidence = evidence
        self._payloads = payloads
        self._report = report
        self._chains: dict[str, Chain] = {}
        self.heads: dict[str, dict[int, bytes]] = {}
        self.records = 0

    # One record

    def read(self, log: str, entry: Entry, digest: bytes) -> tuple[bool, str]:
        """Whether it has to be under a signed head at once, and its time (empty when it has none)."""
        self.records += 1
        try:
            if len(entry.record) > MOST_BYTES:
                raise ValueError("it is too large")
            fields = json.loads(entry.record)
            whose, tenant, at = str(fields["query"]), str(fields["tenant"]), fields["at"]
            if len(at) != 24 or not at.endswith("Z"):
                raise ValueError("it has no time")
            chain = self._chains.get(whose) or self._chains.setdefault(whose, Chain(tenant, Committed(tenant)))
            # Of a log's own chain, the evidence of one query has only what is about that query.
            apart = not self._evidence.whole and whose == log
            if (fields["seq"] != chain.length or fields["prev"] != chain.head) and not apart:
                text = f"query {whose}: record {fields['seq']} does not follow the {chain.length} before it"
                self._report["integrity"].fault(text)
                self._report["completeness"].fault(text)
            if (
                log != (TENANTS + tenant if tenant else PLATFORM)
                or tenant != chain.tenant
                or entry.chain not in (None, whose)
                or entry.seq not in (None, fields["seq"])
            ):
                self._report["integrity"].fault(f"log {log}: entry {entry.leaf} belongs elsewhere")
            if chain.ended not in ("", "interrupted"):
                self._report["integrity"].fault(f"query {whose}: it goes on after it was closed")
            chain.length = int(fields["seq"]) + 1
            chain.head = digest.hex()
            for name, committed in fields["payloads"].items():
                chain.committed.by_place[chain.length - 1, name] = committed
            return self._event(whose, chain, fields["type"], fields["body"]), at
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            self._report["integrity"].fault(f"log {log}: entry {entry.leaf} is not a record")
            return False, ""

    def _event(self, whose: str, chain: Chain, kind: str, body: Any) -> bool:
        if kind in ("call.intent", "call.result"):
            self._call(whose, chain, kind, body)
        elif kind in ("query.closed", "query.interrupted"):
            if body["records"] != chain.length:
                self._report["completeness"].fault(f"query {whose}: it ended with {body['records']} records, not these")
            chain.ended = body["status"] if kind == "query.closed" else "interrupted"
            if kind == "query.closed":
                if read_usd(body["cost_usd"]) != chain.paid.total:
                    self._report["completeness"].fault(f"query {whose}: its cost is not the sum of its calls")
                what = f"payloads of query {whose}"
                self._report["payloads"].guarded(what, lambda: self._payloads.check(whose, chain.committed))
            return True
        elif kind == "query.resumed":
            chain.ended = ""
        elif kind == "tenant.head" and chain.tenant == "":
            root = base64.b64decode(body["root"], validate=True)
            self.heads.setdefault(TENANTS + body["tenant"], {})[int(body["size"])] = root
        elif kind == "payload.erased":
            self._payloads.erase(body["query"], body["seq"], body["name"])
        return kind in ("payload.erased", "query.scored")

    def _call(self, whose: str, chain: Chain, kind: str, body: Any) -> None:
        call = str(body["call"])
        if kind == "call.intent":
            if call in chain.waiting:
                self._report["completeness"].fault(f"query {whose}: call {call} has no result")
            chain.waiting[call] = int(body["attempt"]), read_usd(body["bound_usd"])
            return
        attempt, bound = chain.waiting.pop(call, (0, -1))
        cost = read_usd(body["cost_usd"])
        chain.paid.add(call, attempt, cost)
        if bound < 0:
            self._report["completeness"].fault(f"query {whose}: call {call} has a result, and no intent")
        elif cost > bound:
            self._report["integrity"].fault(f"query {whose}: call {call} cost more than its bound")

    # What should be there

    def check_tenants(self, logs: list[str]) -> None:
        for log in sorted(self.heads.keys() - set(logs)):
            text = f"{log} was signed at {max(self.heads[log])} entries, and is not here: the tenant was dropped"
            self._report["completeness"].fault(text)

    def check_queries(self) -> None:
        listed: set[str] = set()
        for query, tenant, status in self._evidence.queries():
            listed.add(query)
            chain = self._chains.get(query)
            if chain is None:
                self._report["completeness"].fault(f"query {query}: all of its records are missing")
            elif chain.tenant != tenant:
                self._report["integrity"].fault(f"query {query}: its records are of another tenant")
            elif status != (chain.ended or "open"):
                text = f"query {query} is {status}, and its last record says {chain.ended or 'open'}: the chain was cut"
                self._report["completeness"].fault(text)
        for whose in self._chains.keys() - listed:
            if not (whose == PLATFORM or whose.startswith(TENANTS)):
                self._report["completeness"].fault(f"query {whose} has records, and the table of queries lacks it")

    def check_calls(self) -> None:
        if not self._evidence.whole:
            self._check_part()
        for whose, chain in self._chains.items():
            if chain.ended:
                for call in chain.waiting:
                    self._report["completeness"].fault(f"query {whose}: call {call} has no result")

    def _check_part(self) -> None:
        verdict = self._report["completeness"]
        queries = [whose for whose in self._chains if not whose.startswith(TENANTS)]
        if len(queries) != 1:
            verdict.fault(f"this is the evidence of one query, and there are {len(queries)}")
        for whose in queries:
            if self._chains[whose].ended in ("", "interrupted"):
                verdict.fault(f"query {whose} has no end: whether it went on, a part of the journal cannot tell")

    # What others check

    def spent(self) -> Mapping[str, Spent]:
        return {
            whose: Spent(chain.tenant, bool(chain.ended), chain.paid.total, chain.paid.print)
            for whose, chain in self._chains.items()
        }

    def committed(self) -> Mapping[str, Committed]:
        return {whose: chain.committed for whose, chain in self._chains.items()}

    def note(self) -> str:
        """What was looked at."""
        if not self._evidence.whole:
            names = [whose for whose in self._chains if not whose.startswith(TENANTS)]
            return f"a part of a journal: query {', '.join(names)[:200]}"
        chains = [chain for whose, chain in self._chains.items() if not whose.startswith((PLATFORM, TENANTS))]
        going = sum(not chain.ended for chain in chains)
        stopped = sum(chain.ended == "interrupted" for chain in chains)
        return f"{len(chains):,} queries, {going:,} of them open, {stopped:,} interrupted"
