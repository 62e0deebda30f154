"""Is the journal whole? Five verdicts, each for itself, from evidence that may have been forged.

    integrity      each record is what its chain and its log's signed heads say
    append-only    each checkpoint that was given out is still a head of the log
    completeness   nothing lacks: chains, calls, queries, tenants, and the ledger equals the sum of the records
    payloads       what is kept is what was recorded; what is not, was erased on record or never kept
    freshness      time goes forward, and every query that has ended is under a signed head

One pass over each log. Of a query that has ended a few numbers are remembered, of one that goes on its commitments.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from orchestrator.audit.evidence import Entry, Evidence
from orchestrator.audit.money import Spent, check_ledger
from orchestrator.audit.trees import Growing, Tiles
from orchestrator.audit.verdicts import NAMES, Name, Report, Verdict
from orchestrator.core.events import GENESIS, MOST_BYTES, commitment
from orchestrator.core.merkle import HASH, WIDTH, leaf_hash
from orchestrator.core.notes import Checkpoint, NoteError, Verifier, open_checkpoint
from orchestrator.core.units import read_usd

T = TypeVar("T")
HELD = "a checkpoint that you hold"
Known = tuple[Checkpoint, str]
CLOCKS_S = 60  # that the clocks of two machines may differ
PLATFORM = "platform"
_TENANTS = "tenants/"


@dataclass(slots=True)
class Chain:
    """A query as far as its records were read."""

    tenant: str
    length: int = 0
    head: str = GENESIS
    ended: str = ""  # the status that it was closed with, or `interrupted`
    paid: Spent = field(default_factory=lambda: Spent(""))
    is_checked: bool = False  # its payloads
    waiting: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])  # call -> attempt, bound
    committed: dict[tuple[int, str], Mapping[str, Any]] = field(
        default_factory=dict[tuple[int, str], Mapping[str, Any]]
    )


def verify(
    evidence: Evidence,
    held: Sequence[str] = (),
    trusted: Verifier | None = None,
    now: datetime | None = None,
    remembered: Sequence[str] = (),
) -> Report:
    """held: notes of checkpoints that the caller has. trusted: who has to have signed, if the caller knows. remembered:
    notes of what was signed last, as the signer itself keeps them.

    Never raises on what the evidence holds, whatever that is.
    """
    known = [*((note, HELD) for note in held), *((note, "what was signed last here") for note in remembered)]
    return _Verification(evidence, known, len(held), trusted, now or datetime.now(UTC)).run()


class _Verification:
    def __init__(
        self,
        evidence: Evidence,
        known: Sequence[tuple[str, str]],
        held: int,
        trusted: Verifier | None,
        now: datetime,
    ) -> None:
        self._evidence = evidence
        self._known = known  # notes, and what they are to the caller
        self._held = held
        self._trusted = trusted
        self._latest = _stamp(now + timedelta(seconds=CLOCKS_S))
        self._report: Report = {name: Verdict() for name in NAMES}
        self._chains: dict[str, Chain] = {}
        self._erased: set[tuple[str, int | None, str | None]] = set()
        self._missing: list[tuple[str, int, str]] = []  # payloads that were kept once
        self._matching = self._never = 0
        self._heads: dict[str, dict[int, bytes]] = {}  # log -> size -> root, as the platform's log has them
        self._records = self._checkpoints = 0
        self._newest = ""

    def run(self) -> Report:
        self._verifier = self._whose()
        held = self._read_held()
        logs = self._guarded("completeness", "the list of logs", self._evidence.logs) or []
        for oddity in self._guarded("integrity", "the schema", self._evidence.oddities) or []:
            self._report["integrity"].fault(oddity)
        if logs and self._verifier is None:
            self._report["integrity"].fault("nobody has signed these logs")
        # The platform's first: it says which heads of the others were signed.
        for log in sorted({*logs, *held}, key=lambda name: (name != PLATFORM, name)):
            self._guarded("integrity", f"log {log}", lambda log=log: self._log(log, held.get(log, [])))
        if self._evidence.whole:
            if PLATFORM not in logs and (logs or held):
                self._report["completeness"].fault("the platform's log is missing, which says what tenants there were")
            self._tenants(logs)
        self._guarded("completeness", "the table of queries", self._queries)
        self._calls()
        self._guarded("completeness", "the ledger", self._ledger)
        self._guarded("payloads", "the payloads", self._payloads)
        self._say()
        return self._report

    def _guarded(self, name: Name, what: str, work: Callable[[], T]) -> T | None:
        """What cannot even be read is a fault like any other."""
        try:
            return work()
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
            detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self._report[name].fault(f"{what} cannot be read: {detail}")
        return None

    # Who signs

    def _whose(self) -> Verifier | None:
        named = self._guarded("integrity", "the verifier's key", self._evidence.verifier)
        if self._trusted and named and self._trusted != named:
            self._report["integrity"].fault(f"the logs name {named.name} as their signer, which is not the trusted key")
        return self._trusted or named

    def _read_held(self) -> dict[str, list[Known]]:
        found: dict[str, list[Known]] = {}
        for note, what in self._known:
            try:
                if self._verifier is None:
                    raise NoteError("there is no key to check it with")
                head = open_checkpoint(note, self._verifier)
                name, _, log = head.origin.partition("/")
                if name != self._verifier.name:
                    raise NoteError(f"it is of {head.origin}, no log of {self._verifier.name}")
                found.setdefault(log, []).append((head, what))
            except NoteError as error:
                self._report["append-only"].fault(f"{what}: {error}")
        return found

    # One log

    def _log(self, log: str, held: list[Known]) -> None:
        signed = list(self._signed(log))
        if self._evidence.whole:
            self._whole_log(log, signed, held)
        else:
            self._parts_of_log(log, signed, held)

    def _signed(self, log: str) -> Iterator[Checkpoint]:
        for size, note in self._evidence.notes(log):
            self._checkpoints += 1
            if self._verifier is None:
                continue
            try:
                head = open_checkpoint(note, self._verifier)
            except NoteError as error:
                self._report["integrity"].fault(f"log {log}: a checkpoint that is kept: {error}")
                continue
            if (head.origin, head.size) != (f"{self._verifier.name}/{log}", size):
                text = f"log {log}: a checkpoint that is kept at {size} entries is of {head.origin} at {head.size}"
                self._report["integrity"].fault(text)
            else:
                yield head

    def _whole_log(self, log: str, signed: list[Checkpoint], held: list[Known]) -> None:
        wanted: list[tuple[int, bytes, Name, str]] = [
            *((head.size, head.root, "integrity", "a checkpoint that is kept") for head in signed),
            *((head.size, head.root, "append-only", what) for head, what in held),
            *((size, root, "integrity", "the platform's log") for size, root in self._heads.get(log, {}).items()),
        ]
        wanted.sort(key=lambda head: head[0], reverse=True)
        newest = max((head.size for head in signed), default=0)
        tree, latest, unsigned = Growing(), "", 0
        for entry in self._evidence.entries(log):
            self._check_heads(log, tree, wanted)
            digest = leaf_hash(entry.record)
            if not self._in_place(log, tree, entry):
                continue
            if entry.hash is not None and entry.hash != digest.hex():
                self._report["integrity"].fault(f"log {log}: entry {entry.leaf} does not match its hash")
            if not entry.is_ours:
                self._report["integrity"].fault(f"log {log}: entry {entry.leaf} was written by somebody else")
            needs_head, at = self._entry(log, entry, digest)
            latest = self._time(log, entry.leaf, at, latest) if at else latest
            unsigned += needs_head and entry.leaf >= newest
            for level, n, hashes in tree.add(digest):
                self._tile(log, level, n, hashes)
        self._check_heads(log, tree, wanted)
        for level, n, hashes in tree.edges():
            self._tile(log, level, n, hashes)
        for size, _root, name, what in wanted:
            text = f"log {log}: {what} has {size} entries, and {tree.size} are here: its end was cut off"
            self._report[name].fault(text)
            self._report["completeness"].fault(text)
        if unsigned:
            text = f"log {log}: {unsigned} records of an end, an erasure or a score are under no signed head"
            self._report["freshness"].fault(text)

    def _in_place(self, log: str, tree: Growing, entry: Entry) -> bool:
        if entry.leaf < tree.size:
            self._report["integrity"].fault(f"log {log}: entry {entry.leaf} has a place that is taken, or none")
            return False
        if entry.leaf > tree.size:
            lost = entry.leaf - tree.size
            self._report["completeness"].fault(f"log {log}: {lost} entries before entry {entry.leaf} are missing")
            tree.size = entry.leaf  # what follows is held to its chains alone
            tree.broken = True
        return True

    def _tile(self, log: str, level: int, n: int, hashes: bytes) -> None:
        width = len(hashes) // HASH
        kept = self._evidence.tile(log, level, n, width)
        if kept != hashes and not (kept is None and (width < WIDTH or not self._evidence.has_tiles)):
            self._report["integrity"].fault(f"log {log}: tile {level}/{n} is not that of its entries")

    def _check_heads(self, log: str, tree: Growing, wanted: list[tuple[int, bytes, Name, str]]) -> None:
        while wanted and wanted[-1][0] == tree.size:
            size, root, name, what = wanted.pop()
            if tree.broken or tree.root() != root:
                self._report[name].fault(f"log {log}: {what} has another root at {size} entries")
        while wanted and wanted[-1][0] < tree.size:  # entries before this one lack: told already
            wanted.pop()

    def _parts_of_log(self, log: str, signed: list[Checkpoint], held: list[Known]) -> None:
        """Of one query: its entries, and the tiles that lead from them to the signed head."""
        if not signed:
            self._report["integrity"].fault(f"log {log}: there is no checkpoint of it")
            return
        head = max(signed, key=lambda one: one.size)
        tiles = Tiles(self._evidence, log, head.size)
        if tiles.root() != head.root:
            self._report["integrity"].fault(f"log {log}: its tiles do not lead to the signed head")
        for other, what in held:
            if (other.size, other.root) != (head.size, head.root):
                known = tiles.root_at(other.size) if other.size <= head.size else None
                if known is None:
                    text = f"log {log}: {what} cannot be compared with this part of the log: export the whole log"
                    self._report["append-only"].fault(text)
                elif known != other.root:
                    text = f"log {log}: {what} has another root at {other.size} entries"
                    self._report["append-only"].fault(text)
        latest, before = "", -1
        for entry in self._evidence.entries(log):
            digest = leaf_hash(entry.record)
            if entry.leaf <= before or tiles.leaf(entry.leaf) != digest:
                self._report["integrity"].fault(f"log {log}: entry {entry.leaf} is not in the signed log")
            before = max(before, entry.leaf)
            _ended, at = self._entry(log, entry, digest)
            if at:
                latest = self._time(log, entry.leaf, at, latest)

    # One record

    def _entry(self, log: str, entry: Entry, digest: bytes) -> tuple[bool, str]:
        """Whether it has to be under a signed head at once, and its time (empty when it has none)."""
        self._records += 1
        try:
            if len(entry.record) > MOST_BYTES:
                raise ValueError("it is too large")
            fields = json.loads(entry.record)
            whose, tenant, at = str(fields["query"]), str(fields["tenant"]), fields["at"]
            if len(at) != 24 or not at.endswith("Z"):
                raise ValueError("it has no time")
            chain = self._chains.get(whose) or self._chains.setdefault(whose, Chain(tenant))
            # Of a log's own chain, the evidence of one query has only what is about that query.
            apart = not self._evidence.whole and whose == log
            if (fields["seq"] != chain.length or fields["prev"] != chain.head) and not apart:
                text = f"query {whose}: record {fields['seq']} does not follow the {chain.length} before it"
                self._report["integrity"].fault(text)
                self._report["completeness"].fault(text)
            if (
                log != (_TENANTS + tenant if tenant else PLATFORM)
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
                chain.committed[chain.length - 1, name] = committed
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
                self._guarded("payloads", f"payloads of query {whose}", lambda: self._payloads_of(whose, chain))
            return True
        elif kind == "query.resumed":
            chain.ended = ""
        elif kind == "tenant.head" and chain.tenant == "":
            root = base64.b64decode(body["root"], validate=True)
            self._heads.setdefault(_TENANTS + body["tenant"], {})[int(body["size"])] = root
        elif kind == "payload.erased":
            self._erased.add((body["query"], body["seq"], body["name"]))
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

    def _time(self, log: str, leaf: int, at: str, latest: str) -> str:
        """The latest time so far."""
        if at < latest and _read(latest) - _read(at) > timedelta(seconds=CLOCKS_S):
            text = f"log {log}: entry {leaf} is of {at}, after one of {latest}: the clock was set back"
            self._report["freshness"].fault(text)
        if at > self._latest:
            self._report["freshness"].fault(f"log {log}: entry {leaf} is of {at}, which is yet to come")
        self._newest = max(self._newest, at)
        return max(latest, at)

    # What should be there

    def _tenants(self, logs: list[str]) -> None:
        for log in sorted(self._heads.keys() - set(logs)):
            text = f"{log} was signed at {max(self._heads[log])} entries, and is not here: the tenant was dropped"
            self._report["completeness"].fault(text)

    def _queries(self) -> None:
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
            if not (whose == PLATFORM or whose.startswith(_TENANTS)):
                self._report["completeness"].fault(f"query {whose} has records, and the table of queries lacks it")

    def _calls(self) -> None:
        if not self._evidence.whole:
            self._part()
        for whose, chain in self._chains.items():
            if chain.ended:
                for call in chain.waiting:
                    self._report["completeness"].fault(f"query {whose}: call {call} has no result")

    def _part(self) -> None:
        verdict = self._report["completeness"]
        queries = [whose for whose in self._chains if not whose.startswith(_TENANTS)]
        if len(queries) != 1:
            verdict.fault(f"this is the evidence of one query, and there are {len(queries)}")
        for whose in queries:
            if self._chains[whose].ended in ("", "interrupted"):
                verdict.fault(f"query {whose} has no end: whether it went on, a part of the journal cannot tell")

    def _ledger(self) -> None:
        queries = {
            whose: Spent(chain.tenant, bool(chain.ended), chain.paid.total, chain.paid.print)
            for whose, chain in self._chains.items()
        }
        check_ledger(self._evidence, queries, self._report["completeness"])

    # Payloads

    def _payloads_of(self, whose: str, chain: Chain) -> None:
        """When the chain is at its end, so that not all records have to be remembered."""
        verdict, committed = self._report["payloads"], chain.committed
        chain.committed, chain.is_checked = {}, True
        for seq, name, opened in self._evidence.payloads(chain.tenant, whose):
            said = committed.pop((seq, name), None)
            if said is None:
                verdict.fault(f"query {whose}: payload {name} of record {seq} was never recorded")
            elif opened is None or said["commitment"] != commitment(*opened):
                verdict.fault(f"query {whose}: payload {name} of record {seq} is not what was recorded")
            else:
                self._matching += 1
        for (seq, name), said in committed.items():
            if said["kept"]:
                self._missing.append((whose, seq, name))
            else:
                self._never += 1

    def _payloads(self) -> None:
        for whose, chain in self._chains.items():
            if not chain.is_checked:
                self._payloads_of(whose, chain)
        verdict, lost = self._report["payloads"], 0
        for query, seq, name in self._missing:
            if not self._is_erased(query, seq, name):
                verdict.fault(f"query {query}: payload {name} of record {seq} is missing, and was not erased")
                lost += 1
        for query in {query for query, _seq, _name in self._erased}:
            chain = self._chains.get(query)
            for seq, name, _opened in self._evidence.payloads(chain.tenant, query) if chain else ():
                if self._is_erased(query, seq, name):
                    verdict.fault(f"query {query}: payload {name} of record {seq} was erased, and is here")
        erased = len(self._missing) - lost
        verdict.note = f"{self._matching:,} match, {erased:,} erased, {self._never:,} never kept"

    def _is_erased(self, query: str, seq: int, name: str) -> bool:
        return not self._erased.isdisjoint([(query, None, None), (query, seq, None), (query, seq, name)])

    def _say(self) -> None:
        chains = [chain for whose, chain in self._chains.items() if not whose.startswith((PLATFORM, _TENANTS))]
        going = sum(not chain.ended for chain in chains)
        stopped = sum(chain.ended == "interrupted" for chain in chains)
        signer = self._verifier.name if self._verifier else "nobody"
        report = self._report
        report["integrity"].note = f"{self._records:,} records, {self._checkpoints:,} checkpoints of {signer}"
        report["append-only"].note = (
            f"{self._held} checkpoint{'s' * (self._held != 1)} that you hold"
            if self._held
            else "you hold no checkpoint: pass one with --checkpoint, or a rewritten log that was signed again passes"
        )
        report["completeness"].note = f"{len(chains):,} queries, {going:,} of them open, {stopped:,} interrupted"
        if not self._evidence.whole:
            names = [whose for whose in self._chains if not whose.startswith(_TENANTS)]
            report["completeness"].note = f"a part of a journal: query {', '.join(names)[:200]}"
        report["freshness"].note = f"the newest record is of {self._newest or 'no time'}"


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read(at: str) -> datetime:
    return datetime.fromisoformat(at)
