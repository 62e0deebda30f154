"""Is the journal whole? Five verdicts, each for itself, from evidence that may have been forged.

integrity      each record is what its chain and its log's signed heads say
append-only    each checkpoint that was given out is still a head of the log
completeness   nothing lacks: chains, calls, queries, tenants, and the ledger equals the sum of the records
payloads       what is kept is what was recorded; what is not, was erased on record or never kept
freshness      time goes forward, and every query that has ended is under a signed head
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from orchestrator.audit.chains import PLATFORM, Chains
from orchestrator.audit.evidence import Evidence
from orchestrator.audit.logs import Known, Logs
from orchestrator.audit.money import check_ledger
from orchestrator.audit.payloads import Payloads
from orchestrator.audit.verdicts import NAMES, Report, Verdict
from orchestrator.core.notes import NoteError, Verifier, open_checkpoint

HELD = "a checkpoint that you hold"


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
    report: Report = {name: Verdict() for name in NAMES}
    verifier = _whose(evidence, trusted, report["integrity"])
    known = [*((note, HELD) for note in held), *((note, "what was signed last here") for note in remembered)]
    heads = _read_known(known, verifier, report["append-only"])
    payloads = Payloads(evidence, report["payloads"])
    chains = Chains(evidence, payloads, report)
    logs = Logs(evidence, chains, verifier, now or datetime.now(UTC), report)

    names = report["completeness"].guarded("the list of logs", evidence.logs) or []
    for oddity in report["integrity"].guarded("the schema", evidence.oddities) or []:
        report["integrity"].fault(oddity)
    if names and verifier is None:
        report["integrity"].fault("nobody has signed these logs")
    # The platform's first: it says which heads of the others were signed.
    for log in sorted({*names, *heads}, key=lambda name: (name != PLATFORM, name)):
        report["integrity"].guarded(f"log {log}", lambda log=log: logs.check(log, heads.get(log, [])))
    if evidence.whole:
        if PLATFORM not in names and (names or heads):
            report["completeness"].fault("the platform's log is missing, which says what tenants there were")
        chains.check_tenants(names)
    report["completeness"].guarded("the table of queries", chains.check_queries)
    chains.check_calls()
    report["completeness"].guarded("the ledger", lambda: check_ledger(evidence, chains.spent(), report["completeness"]))
    report["payloads"].guarded("the payloads", lambda: payloads.finish(chains.committed()))

    signer = verifier.name if verifier else "nobody"
    report["integrity"].note = f"{chains.records:,} records, {logs.checkpoints:,} checkpoints of {signer}"
    report["append-only"].note = _note_on_held(len(held))
    report["completeness"].note = chains.note()
    report["freshness"].note = f"the newest record is of {logs.newest or 'no time'}"
    return report


def _whose(evidence: Evidence, trusted: Verifier | None, verdict: Verdict) -> Verifier | None:
    named = verdict.guarded("the verifier's key", evidence.verifier)
    if trusted and named and trusted != named:
        verdict.fault(f"the logs name {named.name} as their signer, which is not the trusted key")
    return trusted or named


def _read_known(
    known: Iterable[tuple[str, str]], verifier: Verifier | None, verdict: Verdict
) -> dict[str, list[Known]]:
    """By log. known: notes, and what they are to the caller."""
    found: dict[str, list[Known]] = {}
    for note, what in known:
        try:
            if verifier is None:
                raise NoteError("there is no key to check it with")
            head = open_checkpoint(note, verifier)
            name, _, log = head.origin.partition("/")
            if name != verifier.name:
                raise NoteError(f"it is of {head.origin}, no log of {verifier.name}")
            found.setdefault(log, []).append((head, what))
        except NoteError as error:
            verdict.fault(f"{what}: {error}")
    return found


def _note_on_held(held: int) -> str:
    if not held:
        return "you hold no checkpoint: pass one with --checkpoint, or a rewritten log that was signed again passes"
    return f"{held} checkpoint{'s' * (held != 1)} that you hold"
