"""What is shown of the journal, as the OpenAPI document has it."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any, Literal

from pydantic import BaseModel, Field

from orchestrator.audit.verdicts import Name

_ID = "20261126-010203-0123456789"
_RECORD: dict[str, Any] = {
    "at": "2026-11-26T01:02:03.719Z",
    "body": {"for": "last word", "usd": "0.02"},
    "node": "root",
    "payloads": {},
    "policy": "1e" * 32,
    "prev": "fc" * 32,
    "query": _ID,
    "seq": 1,
    "tenant": "acme",
    "type": "budget.held",
    "v": 1,
}
CHECKPOINT = """airlock-d43ac93f9a19cd5f/tenants/acme
2
QJB1GHJM+c726XzjI6YWYZ5wTe6S5hTnkkVpwRAdrPU=

— airlock-d43ac93f9a19cd5f OxySLwP1Zj6ddhY+gC25IcI5dCiMK0j9D+x1jreLHOLgYzqBFoAtmJZFlxWapUUOyxjFZAhTBLjzXcUZHTHSZAn19Qk=
"""
PROOF = f"""c2sp.org/tlog-proof@v1
extra {b64encode(json.dumps(_RECORD, separators=(",", ":")).encode()).decode()}
index 1
/O8ufqrUUwNba4cELP/BJ85w7dbbPct/cV/7zY/izcI=

{CHECKPOINT}"""
GROWTH = f"""old 1
/O8ufqrUUwNba4cELP/BJ85w7dbbPct/cV/7zY/izcI=

{CHECKPOINT}"""
KEY = "airlock-d43ac93f9a19cd5f+3b1c922f+AcirOQcX2X0UsyKteM8Y4dF4uPam1QgUSANJjj4LbjPz\n"


def text(example: str) -> dict[str, Any]:
    """What an answer in plain text holds."""
    return {"content": {"text/plain": {"schema": {"type": "string"}, "example": example}}}


class LinkView(BaseModel):
    """A record, as `records.v1.schema.json` has it, and its hash: SHA-256 of a zero byte and its canonical JSON."""

    record: dict[str, Any] = Field(examples=[_RECORD])
    hash: str = Field(pattern="^[0-9a-f]{64}$", examples=["8e" * 32])


class RecordPage(BaseModel):
    """next: `after` of the next page, null where there is nothing more yet."""

    records: list[LinkView]
    next: int | None = Field(examples=[1])


class VerdictView(BaseModel):
    """detail: what was looked at; where it does not hold, what is wrong. faults: the first of them."""

    name: Name = Field(examples=["integrity"])
    holds: bool = Field(examples=[True])
    detail: str = Field(examples=["11 records, 2 checkpoints of airlock-d43ac93f9a19cd5f"])
    faults: list[str] = Field(examples=[[]])


class VerdictsView(BaseModel):
    """whole: every verdict holds."""

    whole: bool = Field(examples=[True])
    verdicts: list[VerdictView]


class CellView(BaseModel):
    """A cell that was run again. why: unless it is the same. diff: lines of unified diffs."""

    node: str = Field(examples=["root"])
    cell: int = Field(examples=[1])
    verdict: Literal["same", "different", "not compared"] = Field(examples=["same"])
    why: str = Field(examples=[""])
    diff: list[str] = Field(examples=[[]])


class ReplayView(BaseModel):
    """id: of the query. same: nothing that was compared is different."""

    same: bool = Field(examples=[True])
    id: str = Field(examples=[_ID])
    backend: str = Field(examples=["gvisor"])
    isolation: str = Field(examples=["kernel"])
    cells: list[CellView]
    notes: list[str] = Field(examples=[["the sandbox has another Python than the query had: 3.11.2, then 3.12.1"]])
