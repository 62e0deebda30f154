"""What `airlock run --server` does: a query that a service runs, watched and ended from here."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import click
from pydantic import ValidationError

from orchestrator import settings
from orchestrator.client import Client
from orchestrator.client.answers import Query, Record, ServiceError, Stored
from orchestrator.console import Bounds, PlainView
from orchestrator.core.errors import KINDS, MachineError, RequestError
from orchestrator.core.events import Event
from orchestrator.core.policy import Policy
from orchestrator.core.units import read_usd, usd
from orchestrator.live import LiveView
from orchestrator.streams import say
from orchestrator.views import INTERRUPTED, STATUS_EXIT, make_view

KEY_VARIABLE = "AIRLOCK_API_KEY"


def run(server: str, question: str, options: Mapping[str, Any], schema: Any) -> int:
    """One query with a root LM; the exit code. options: as for `runs.run`."""
    variable = options["api_key_env"] or KEY_VARIABLE
    key = settings.api_key(variable)
    if key is None:
        raise RequestError(f"there is no API key for {server}: set {variable}, or name a variable with --api-key-env")
    signals = _Signals()
    with Client(server, key.get_secret_value()) as client, signals:
        remote = _Remote(client, signals)
        try:
            with make_view() as view:
                query = remote.watch(question, options, schema, view)
        except _Interrupted:
            why = f"query {remote.query} is being cancelled" if remote.query else "the query has not begun"
            click.echo(f"airlock: interrupted: {why}", err=True)
            return INTERRUPTED
    return _answer(query, server, options, remote)


class _Interrupted(BaseException):
    """By a signal; what is in between needs not know of it."""


class _Signals:
    """Ctrl-C, SIGTERM and SIGHUP raise _Interrupted, when nothing holds them; a SIGHUP does not that we were started to
    ignore, as nohup does.
    """

    def __init__(self) -> None:
        self._held = self._come = False
        self._before = dict[int, Any]()

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if number != signal.SIGHUP or before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._take)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _take(self, _number: int, _frame: object) -> None:
        self._come = True
        if not self._held:
            raise _Interrupted

    @contextmanager
    def held(self) -> Generator[None]:
        """What must not be cut in two: a signal is taken after it."""
        self._held, self._come = True, False
        try:
            yield
        finally:
            self._held = False
        if self._come:
            raise _Interrupted


class _Remote:
    """A query at a service. query: its id, when it is on record."""

    def __init__(self, client: Client, signals: _Signals) -> None:
        self._client, self._signals = client, signals
        self._after = -1
        self.query = ""
        self.more: Mapping[str, Any] = {}

    def watch(self, question: str, options: Mapping[str, Any], schema: Any, view: PlainView | LiveView) -> Query:
        """From its context to its end. Raises _Interrupted where it was before there was a query."""
        context = self._context(options["context"], options["encoding"])
        try:
            with self._signals.held():
                asked = self._client.ask(
                    question,
                    context,
                    model=options["model"],
                    sub_models=options["sub_models"],
                    budget_usd=None if options["budget"] is None else usd(options["budget"]),
                    timeout_s=None if options["timeout"] is None else options["timeout"] / 1000,
                    depth=options["depth"],
                    answer_schema=schema,
                    idempotency_key=secrets.token_hex(16),
                )
                self.query = asked.id
            seen = _Seen(view, asked)
            self._follow(seen)
        except _Interrupted:
            if not self.query:
                raise
            self._end()
        return self._found(options)

    def _context(self, path: str, encoding: Any) -> Stored:
        if not path:
            raise RequestError("--context is empty: name a file, a folder, or - for standard input")
        if path == "-":
            return self._client.upload(_StandardInput(), name="standard input", encoding=encoding)
        return self._client.upload(Path(path), encoding=encoding)

    def _follow(self, seen: _Seen) -> None:
        with closing(cast("Generator[Record]", self._client.events(self.query, self._after))) as records:
            for record in records:
                self._after = record.seq
                seen.take(record)

    def _end(self) -> None:
        """Cancel it, and wait until it is; another signal ends the wait."""
        with self._client.again() as client:  # this one was interrupted anywhere
            try:
                with self._signals.held():
                    client.cancel(self.query)
                client.wait(self.query)
            except ServiceError as error:
                raise MachineError(f"query {self.query} may go on at the service: {error}") from None

    def _found(self, options: Mapping[str, Any]) -> Query:
        with self._client.again() as client:
            query = client.wait(self.query, self._after)
            if options["as_json"]:
                self.more = {"usage": asdict(client.spend(self.query))["models"], "checkpoint": _checkpoint(client)}
            return query


def _checkpoint(client: Client) -> str:
    """Empty where the key may not read it."""
    try:
        return client.checkpoint()
    except ServiceError as error:
        if error.status not in (403, 404):
            raise
        return ""


class _StandardInput:
    def read(self, size: int, /) -> bytes:
        return os.read(sys.stdin.fileno(), size)


@dataclass(slots=True)
class _Tally:
    """How far a query is, as its records have it; see `Counts`."""

    turns: int = 0
    sub_calls: int = 0
    children: int = 0
    running: int = 0
    spent: int = 0

    def count(self, record: Record) -> None:
        body = record.body
        match record.type:
            case "call.intent":
                self.running += 1
                self.turns += body["role"] == "root" and record.node == "root"
            case "call.result":
                self.running -= 1
                self.spent += read_usd(body["cost_usd"])
            case "node.opened":
                self.children += 1
            case "query.interrupted":
                self.running = 0
            case _:
                pass
        self.sub_calls = max(self.sub_calls, body.get("sub_call") or 0)


class _Seen:
    """A view, shown a service's records as it is shown what happens here."""

    def __init__(self, view: PlainView | LiveView, query: Query) -> None:
        self._view, self._query, self._tally = view, query, _Tally()

    def take(self, record: Record) -> None:
        if record.type == "query.opened":
            self._view.begin(self._bounds(record.payloads.get("policy", "")), self._tally)
        self._tally.count(record)
        if record.type == "cell.ended":
            for stream, name in (("out", "stdout"), ("err", "stderr")):
                self._view.output(stream, record.payloads.get(name, ""))
        self._view.event(Event(cast("Any", record.type), record.node, record.body, record.payloads))

    def _bounds(self, policy: str) -> Bounds:
        query = self._query
        try:
            return Bounds.of(query.id, Policy.model_validate_json(policy, strict=False))
        except ValidationError:  # it is not kept, or of a newer Airlock
            return Bounds(query.id, read_usd(query.limit_usd), None, None)


def _answer(query: Query, server: str, options: Mapping[str, Any], remote: _Remote) -> int:
    """Print what came of it; the exit code."""
    if options["as_json"]:
        _give(json.dumps(_report(query, remote.more)), query, server)
    elif query.answer is not None:
        _give(query.answer, query, server)
    elif query.status == "answered":
        raise MachineError("the tenant's policy keeps no answers, so the service has none to give")
    if query.status != "answered":
        why = "" if query.reason == query.status else f": {query.reason}"
        say(sys.stderr, f"airlock: {query.status}{why}")
    return _exit_code(query)


def _exit_code(query: Query) -> int:
    kind = query.reason.partition(":")[0]
    if query.status == "failed" or (query.status == "refused" and kind in KINDS):
        return KINDS[kind].exit_code if kind in KINDS else 1
    return STATUS_EXIT[query.status]


def _report(query: Query, more: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a query that was run here."""
    return {
        "query_id": query.id,
        "status": query.status,
        "answer": query.answer,
        "reason": query.reason,
        "cost_usd": query.cost_usd,
        "usage": more["usage"],
        "iterations": query.iterations,
        "sub_calls": query.sub_calls,
        "duration_s": query.duration_s,
        "backend": query.backend,
        "isolation": query.isolation,
        "journal_head": query.journal_head,
        "checkpoint": more["checkpoint"],
    }


def _give(text: str, query: Query, server: str) -> None:
    """Print what was asked for. Raises BrokenPipeError, or MachineError that says where it can still be had."""
    try:
        say(sys.stdout, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"it is at the service: {server.rstrip('/')}/q/{query.id}"
        why = f"standard output cannot be written ({error.strerror}), and the answer is not there"
        raise MachineError(f"{why}; {where}") from None
