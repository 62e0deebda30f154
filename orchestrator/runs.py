"""What `airlock run` and `airlock exec` do, from the options of the command line to its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import click

from orchestrator import settings
from orchestrator.auditing import past_of
from orchestrator.choices import Choices
from orchestrator.core.errors import MachineError, ProviderError, RequestError
from orchestrator.core.units import parse_price, usd
from orchestrator.guest.wire import MAX_LINE
from orchestrator.interrupts import StandardInput, cancelled_by_signals
from orchestrator.streams import Printer, say
from orchestrator.views import INTERRUPTED, STATUS_EXIT, make_view
from orchestrator.wiring import Platform, Watch, open_platform

if TYPE_CHECKING:
    from orchestrator.loop.order import Closed

Start = Callable[..., Awaitable[Any]]  # of a query: given `watch`

_CELL_EXIT = {"ok": 0, "error": 1, "timeout": 3, "killed": 4}


async def run(question: str, options: dict[str, Any], schema: Any) -> int:
    """One query with a root LM; the exit code. options: those that `run` and `exec` share, by their names."""
    async with open_platform(_choices(options, schema)) as platform:
        platform.require(question)
        for query in platform.interrupted:
            click.echo(f"query {query} was interrupted when its process died: {_resume(query)}", err=True)
        closed = await _viewed(_with_context(platform, options, partial(platform.run, question)))
    return _answer(closed, platform, options)


async def resume(query: str, options: dict[str, Any]) -> int:
    """Go on with an interrupted query; the exit code. options: those that `run` and `exec` share."""
    past = past_of(settings.home(), query, to_resume=True)
    past.require_to_resume()
    backend = past.backend if options["backend"] == "auto" else options["backend"]
    choices = replace(_choices(options), policy=past.rules, backend=backend)
    printed = _Printed(options)
    async with open_platform(choices) as platform:
        start = partial(platform.resume, past.query)
        closed = await (_viewed(start) if past.code is None else printed.run(start))
    return _answer(closed, platform, options) if past.code is None else printed.end(closed, platform)


async def _viewed(start: Start) -> Closed | None:
    view = make_view()
    watch = Watch(event=view.event, output=view.output, account=view.account)
    with view:
        return await _watched(start, watch)


def _answer(closed: Closed | None, platform: Platform, options: dict[str, Any]) -> int:
    """Print what came of a query with a root LM; the exit code."""
    if closed is None:
        click.echo("airlock: interrupted before the query began", err=True)
        return INTERRUPTED
    outcome = closed.outcome
    if options["as_json"]:
        _give(json.dumps(_report(closed, platform.backend)), closed, platform)
    elif outcome.answer is not None:
        _give(outcome.answer, closed, platform)
    if outcome.status != "answered":
        # The record is the tenant's, and does not tell where a provider is; who runs the command may know.
        reason = f"{closed.error.kind}: {closed.error}" if isinstance(closed.error, ProviderError) else outcome.reason
        why = "" if reason == outcome.status else f": {reason}"  # cancelled is all there is to say
        say(sys.stderr, f"airlock: {outcome.status}{why}{_again(closed)}")
    return closed.error.exit_code if closed.error else STATUS_EXIT[outcome.status]


def _again(closed: Closed) -> str:
    """What can be done about a query that was interrupted."""
    return f"; {_resume(closed.query_id)}" if closed.outcome.status == "interrupted" else ""


def _resume(query: str) -> str:
    return f"airlock run --resume {query}, with --base-url and --api-key-env as it had them"


def _give(text: str, closed: Closed, platform: Platform) -> None:
    """Print what was asked for. Raises BrokenPipeError, or MachineError that says where it can still be had."""
    try:
        say(sys.stdout, text)
    except OSError as error:
        raise _undelivered(error, closed, platform) from None


def _undelivered(error: OSError, closed: Closed, platform: Platform) -> Exception:
    if isinstance(error, BrokenPipeError):
        return error
    kept = "answer" in platform.policy.audit.payloads
    where = f"it is in the journal: airlock audit show {closed.query_id}" if kept else "the policy keeps no copy of it"
    return MachineError(f"standard output cannot be written ({error.strerror}), and the answer is not there; {where}")


def _report(closed: Closed, backend: Any) -> dict[str, Any]:
    usage = {
        name: {
            "calls": u.calls,
            "input_tokens": u.input_tokens,
            "output_tokens": u.output_tokens,
            "cost_usd": usd(u.cost),
        }
        for name, u in closed.usage.items()
    }
    return {
        "query_id": closed.query_id,
        "status": closed.outcome.status,
        "answer": closed.outcome.answer,
        "reason": closed.outcome.reason,
        "cost_usd": usd(closed.cost),
        "usage": usage,
        "iterations": closed.turns,
        "sub_calls": closed.sub_calls,
        "duration_s": round(closed.duration_s, 3),
        "backend": backend.name,
        "isolation": backend.isolation.name,
        "journal_head": closed.journal_head,
        "checkpoint": closed.checkpoint,
    }


async def run_cell(code: str, options: dict[str, Any]) -> int:
    """One query that is one cell; the exit code."""
    if len(json.dumps(code)) > MAX_LINE - 1024:  # what else is in its frame
        raise RequestError(
            f"the program is larger than a sandbox takes ({MAX_LINE >> 20} MiB, as JSON): give its data as --context"
        )
    printed = _Printed(options)
    async with open_platform(_choices(options)) as platform:
        platform.require(None)
        closed = await printed.run(_with_context(platform, options, partial(platform.run, "", code=code)))
    return printed.end(closed, platform)


class _Printed:
    """A query that is one cell: what the cell prints is printed as it comes, and its answer after it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._as_json = options["as_json"]
        self._seen: dict[str, list[str]] = {"out": [], "err": []}
        self._printer = Printer()

    def _output(self, stream: str, text: str) -> None:
        self._seen[stream].append(text)
        if not self._as_json:
            self._printer.put(stream, text)

    async def run(self, start: Start) -> Closed | None:
        async def printed(**given: Any) -> None:
            async with self._printer:
                await start(**given)

        return await _watched(printed, Watch(output=self._output))

    def end(self, closed: Closed | None, platform: Platform) -> int:
        """The exit code."""
        if closed is None:
            return INTERRUPTED
        if self._printer.broken:
            raise _undelivered(self._printer.broken, closed, platform)
        cell = closed.cell
        status = cell.status if cell else "timeout" if closed.outcome.status == "limit" else "killed"
        reason = closed.outcome.reason + _again(closed)
        if closed.outcome.status == "interrupted":
            status = "interrupted"
        if self._as_json:
            report = {
                "status": status,
                "reason": reason,
                "stdout": "".join(self._seen["out"]),
                "stderr": "".join(self._seen["err"]),
                "answer": closed.outcome.answer,
                "duration_s": round(cell.duration_s if cell else closed.duration_s, 3),
            }
            _give(json.dumps(report), closed, platform)
        elif closed.outcome.answer is not None and self._printer.whole:
            _give(closed.outcome.answer, closed, platform)
        if status in ("timeout", "killed", "interrupted"):
            say(sys.stderr, f"airlock: {status}: {reason}")
        if closed.error:
            return closed.error.exit_code
        interrupted = closed.outcome.status in ("cancelled", "interrupted") or not self._printer.whole
        return INTERRUPTED if interrupted else _CELL_EXIT[status]


def platform_choices(options: dict[str, Any]) -> Choices:
    """Those that are not of one query. Raises RequestError."""
    return Choices(
        model=options["model"],
        sub_models=options["sub_models"],
        base_url=options["base_url"],
        api_key_env=options["api_key_env"],
        prices=dict(_price(text) for text in options["prices"]),
        backend=options["backend"],
        policy=options["policy"],
    )


def _choices(options: dict[str, Any], schema: Any = None) -> Choices:
    return replace(
        platform_choices(options),
        budget=options["budget"],
        timeout_ms=options["timeout"],
        depth=options["depth"],
        answer_schema=schema,
        pool=0,  # one query is all there will be
    )


def _price(text: str) -> tuple[str, tuple[Decimal, Decimal]]:
    try:
        return parse_price(text)
    except ValueError as error:
        raise RequestError(f"--price {error}") from None


def _with_context(platform: Platform, options: dict[str, Any], start: Start) -> Start:
    """Ingest the context first."""

    async def begin(**given: Any) -> None:
        with StandardInput() as stdin:
            ingest = partial(_ingest, platform, options["context"], options["encoding"], stdin)
            context = await anyio.to_thread.run_sync(ingest, abandon_on_cancel=True)
        await start(context=context, **given)

    return begin


async def _watched(start: Start, watch: Watch) -> Closed | None:
    """Run the query; signals end it in good order. None if it never began."""
    result: list[Closed] = []
    watch.closed = result.append
    with anyio.CancelScope() as scope, cancelled_by_signals(scope):
        await start(watch=watch)
    return result[0] if result else None


def _ingest(platform: Platform, path: str | None, encoding: Any, stdin: Any) -> Any:
    if path is None:  # of `exec`
        return platform.contexts.nothing()
    if not path:
        raise RequestError("--context is empty: name a file, a folder, or - for standard input")
    if path == "-":
        return platform.contexts.ingest_stream(stdin, encoding=encoding)
    return platform.contexts.ingest(Path(path), encoding=encoding)
