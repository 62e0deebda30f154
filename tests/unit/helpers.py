"""What the unit tests share: policies, a fake LM for the seam, and a query in a real store."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
from hypothesis import settings

from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.policy_file import parse_policy
from orchestrator.lm.base import LM, Message, Reply, Request, Usage
from orchestrator.proxy.account import Account, Node
from orchestrator.sandbox.sandbox import CellResult
from orchestrator.store import journal, ledger
from orchestrator.store.db import Database
from orchestrator.store.journal import QueryKey
from orchestrator.store.ledger import Scope
from orchestrator.store.vault import Keeper
from orchestrator.store.writer import Writer
from tests.postgres import Postgres

POLICIES = Path(__file__).parents[2] / "policies"
DEFAULT = parse_policy((POLICIES / "default.yaml").read_text(), "default.yaml")

quick = settings(max_examples=25, deadline=None)  # a busy machine is not a fault


def policy(**sections: dict[str, Any]) -> Policy:
    """The default policy with some fields changed, in their exact units: `policy(money={"query": 100})`."""
    changed = {name: getattr(DEFAULT, name).model_copy(update=fields) for name, fields in sections.items()}
    return DEFAULT.model_copy(update=changed)


@functools.cache
def _migrated() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Database(Path(folder)).close()
        return (Path(folder) / "airlock.db").read_bytes()


def fill(home: Path) -> None:
    """Put an empty database of SQLite there; its migrations are run once for all tests."""
    (home / "airlock.db").write_bytes(_migrated())


def database(home: Path) -> Database:
    fill(home)
    return Database(home)


@dataclass(frozen=True)
class Store:
    """A database that any number of owners may open. server: where it runs, unless it is a file."""

    home: Path
    url: str | None = None
    server: Postgres | None = None

    def open(self) -> Database:
        return Database(self.home, self.url)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str, finish: str = "stop", usage: Usage | None = None) -> Reply:
    return Reply(text, finish, usage)


class FakeLM(LM):
    """Says its answers one after the other, the last one again and again; an exception is raised instead."""

    def __init__(self, *answers: Reply | Exception, before: Callable[[], object] = lambda: None) -> None:
        self.answers = answers
        self.before = before
        self.requests: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        self.requests.append(request)
        self.before()
        await anyio.lowlevel.checkpoint()
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def aclose(self) -> None:
        """Nothing is held."""


class HangingLM(FakeLM):
    """Never answers; `asked` is set once it was."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = anyio.Event()

    async def ask(self, request: Request) -> Reply:
        self.asked.set()
        await anyio.sleep_forever()
        raise AssertionError("a sleep without end has ended")


def cell(text: str = "", status: Any = "ok", **fields: Any) -> CellResult:
    """What a cell that printed `text` comes back as."""
    return CellResult(status, fields.pop("detail", ""), [("out", text)] if text else [], **fields)


class Everything:
    """Of payloads: each of them is kept."""

    def __contains__(self, _name: object) -> bool:
        return True


def keeper(query: str) -> Keeper:
    """Keeps all payloads of a query, under a key of no tenant."""
    return Keeper(bytes(32), query, Everything())


class Query:
    """An open query in a real store, with an account to ask from."""

    def __init__(
        self,
        db: Database,
        rules: Policy,
        number: int = 1,
        sub_models: Sequence[str] = ("sub",),
        tenant: str = "default",
    ) -> None:
        self.db = db
        self.key = QueryKey(f"q{number}", tenant, rules.sha256(), keeper(f"q{number}"))
        self.scopes = [Scope(f"query:{self.key.id}", rules.money.query), Scope("tenant-day:d", rules.money.tenant_day)]
        self.seen: list[Event] = []
        self.account = Account(
            key=self.key,
            policy=rules,
            writer=Writer(db),
            recorded=self.seen.append,
            in_flight=anyio.Semaphore(rules.counts.in_flight),
        )
        self.node = Node(
            account=self.account,
            name="root",
            depth=0,
            scopes=self.scopes,
            deadline=time.monotonic() + 60,
            sub_models=sub_models,
        )
        db.write_sync(self._open)

    def _open(self, tx: journal.Connection) -> None:
        ledger.open_scopes(tx, self.scopes)
        journal.open_query(tx, self.key, self.db.owner, Event("query.opened", "root", {}))

    def balance(self, scope: int = 0) -> tuple[int, int]:
        return self.db.read(lambda tx: ledger.balance(tx, self.scopes[scope].id))

    def records(self, kind: str = "") -> list[dict[str, Any]]:
        chain = self.db.read(lambda tx: journal.chain(tx, self.key.id))
        fields = [json.loads(record) for record, _ in chain]
        return [found for found in fields if found["type"].startswith(kind)]

    def payloads(self) -> list[tuple[int, str, bytes, bytes]]:
        """(seq, name, salt, data)"""
        assert self.key.keeper is not None
        kept = self.db.read(lambda tx: list(journal.kept_payloads(tx, self.key.id)))
        opened = [(seq, name, self.key.keeper.open(seq, name, sealed)) for seq, name, sealed in kept]
        return [(seq, name, *both) for seq, name, both in opened if both]
