"""`airlock audit`: the journal, read, checked, handed to others, and erased from."""

from __future__ import annotations

import json
import sys
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import click

from orchestrator import settings
from orchestrator.console import counted
from orchestrator.core.errors import RequestError
from orchestrator.files import Unreadable, read_text
from orchestrator.streams import say

MOST = 2**31 - 1  # of a record's number: what the database's column holds
MORE_PAYLOADS = ("asked", "order")  # kept with those that a policy names


class _Score(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic in the stubs alone
    name = "score"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:
        try:
            score = Decimal(str(value))
        except InvalidOperation:
            score = Decimal(-1)
        if not (score.is_finite() and 0 <= score <= 1 and -score.as_tuple().exponent <= 6):  # pyright: ignore
            self.fail(f"{value!r} is not a number from 0 to 1 with at most six decimals", param, ctx)
        return score


@click.group()
def audit() -> None:
    """The journal: read, check, hand out, erase."""


@audit.command(name="show")
@click.argument("query", default="last")
def show(query: str) -> int:
    """Print a QUERY's run: code, output, sub-calls, cost. An id, its beginning, or `last`."""
    from orchestrator.auditing import read_run
    from orchestrator.console import show_run

    run_read = read_run(settings.home(), query)
    for line in show_run(run_read.chain, run_read.payloads, run_read.fault):
        say(sys.stdout, line)
    return 4 if run_read.fault else 0


@audit.command(name="verify")
@click.argument("export", required=False, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="One that you hold: the log has to go on from it. May be repeated.",
)
@click.option(
    "--anchor", "places", multiple=True, metavar="PLACE", help="Where checkpoints were put; see `audit anchor`."
)
@click.option("--key", help="Who has to have signed, as `airlock audit key` prints it; you got it another way.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    export: Path | None, checkpoints: tuple[Path, ...], places: tuple[str, ...], key: str | None, as_json: bool
) -> int:
    """Check the journal of this data folder, or an EXPORT: a tar, or a proof of the service's.

    A proof of one record ends in .tlog-proof; one that the log went on from a checkpoint, in .tlog-consistency.
    Exit code 0 when every verdict holds, else 1.
    """
    from orchestrator import auditing

    held, trusted = auditing.read_notes(checkpoints), auditing.read_verifier(key)
    if export is not None and export.suffix in (".tlog-proof", ".tlog-consistency"):
        if trusted is None:
            raise RequestError("a proof is checked with the key of whoever signed it: give --key")
        try:
            text = read_text(export)
        except Unreadable as why:
            raise RequestError(f"cannot read {export}: {why}") from None
        if export.suffix == ".tlog-proof":
            say(sys.stdout, auditing.check_proof(text, trusted).decode("utf-8", "replace"))
        else:
            now = auditing.check_growth(text, held, trusted)
            say(sys.stdout, f"{now.origin} went on from what you hold, and has {now.size} entries")
        return 0
    if export is None:
        report = auditing.verify_home(settings.home(), held, trusted, places)
    else:
        report = auditing.verify_archive(export, held, trusted, places)
    if as_json:
        rows = {
            name: {"holds": v.holds, "note": v.note, "faults": v.faults, "count": v.count} for name, v in report.items()
        }
        say(sys.stdout, json.dumps(rows))
    else:
        for name, verdict in report.items():
            say(sys.stdout, f"{name:13} {'holds' if verdict.holds else 'FAILS'}  {verdict.note}")
            for fault in verdict.faults:
                say(sys.stdout, f"{'':13} - {fault}")
            if verdict.count > len(verdict.faults):
                say(sys.stdout, f"{'':13} - and {verdict.count - len(verdict.faults):,} more")
    return 0 if all(verdict.holds for verdict in report.values()) else 1


@audit.command(name="export")
@click.argument("query", required=False)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where to write it.")
@click.option(
    "--format",
    "name",
    type=click.Choice(["tar", "otlp", "ocsf", "rlms", "chat"]),
    default="tar",
    show_default=True,
    help="tar: to be verified. otlp: OpenTelemetry spans. ocsf: security events. rlms: the trace that its visualizer "
    "opens. chat: a line a turn, to train on.",
)
@click.option("--content", is_flag=True, help="With texts: prompts and replies in otlp, code in ocsf.")
@click.option("--endpoint", metavar="URL", help="Send spans to this collector (OTLP over HTTP) instead.")
@click.option("--status", metavar="STATUS", help="chat: of loops that ended so, such as answered.")
@click.option("--least-score", type=_Score(), metavar="X", help="chat: of queries with this score or a better one.")
def export(query: str | None, out: Path | None, name: Any, endpoint: str | None, **options: Any) -> None:
    """Write the journal, or one QUERY of it (an id, its beginning, or `last`), for others."""
    from orchestrator import auditing
    from orchestrator.exports import writing

    if (out is None) == (endpoint is None):
        raise RequestError("say where it goes: --out FILE, or --endpoint URL for spans")
    if endpoint is not None and name not in ("tar", "otlp"):
        raise RequestError("--endpoint takes spans: --format otlp")
    if name != "chat" and (options["status"] or options["least_score"] is not None):
        raise RequestError("--status and --least-score choose what to train on: --format chat")
    if name == "tar" and out:
        auditing.export_archive(settings.home(), query, out)
        click.echo(f"{out} is written: check it with `airlock audit verify {out}`", err=True)
        return
    with auditing.open_books(settings.home()) as books:
        histories = auditing.histories(books, query)
        if endpoint is not None:
            sent = writing.send(histories, endpoint, content=options["content"])
            click.echo(f"{counted(sent, 'span')} sent", err=True)
            return
        scores = auditing.scores(books)
        chosen = writing.Options(options["content"], scores, options["status"], options["least_score"])
        assert out is not None, "without an endpoint there is a file"
        with writing.draft(out) as file:
            done = writing.write(cast("writing.Format", name), histories, file, chosen)
    lacking = f"; {done.left_out:,} left out, for their texts are not all kept" if done.left_out else ""
    what = f"{counted(done.lines, 'line')} of {done.queries:,} {'query' if done.queries == 1 else 'queries'}"
    click.echo(f"{out} is written: {what}{lacking}", err=True)


@audit.command(name="replay")
@click.argument("query", default="last")
@click.option("--backend", metavar="NAME", help="How the sandboxes are isolated; default: as they were.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(query: str, backend: str | None, as_json: bool) -> int:
    """Run a QUERY's cells again, with what they asked for answered from the journal, and show what is different.

    Exit codes: 0 nothing is; 1 something is; 4 it cannot be done.
    """
    from orchestrator.replays import report

    return anyio.run(
        partial(report, settings.home(), query, backend, as_json=as_json), backend_options={"use_uvloop": True}
    )


@audit.command(name="prove")
@click.argument("query")
@click.argument("record", type=click.IntRange(0, MOST))
def prove(query: str, record: int) -> None:
    """Print a proof that a RECORD (its number) of a QUERY is in the journal (C2SP tlog-proof)."""
    from orchestrator import auditing

    with auditing.open_books(settings.home()) as books:
        click.echo(auditing.prove(books, books.find(query), record), nl=False)


@audit.command(name="anchor")
@click.argument("places", nargs=-1, metavar="[PLACE]...")
def anchor(places: tuple[str, ...]) -> None:
    """Put the newest checkpoints where nobody can change them.

    A PLACE is file:/FOLDER, s3://BUCKET/PREFIX?days=N (with object lock), or rfc3161+https://AUTHORITY; without one,
    those of airlock.toml, [audit] anchors.
    """
    from orchestrator.auditing import put_anchors

    for line in put_anchors(settings.home(), places):
        click.echo(line, err=True)


@audit.command(name="key")
def key() -> None:
    """Print the key that checkpoints are verified with. Give it to those who audit."""
    from orchestrator.auditing import verifier_of

    click.echo(str(verifier_of(settings.home())))


@audit.command(name="erase")
@click.argument("query")
@click.option("--record", type=click.IntRange(0, MOST), help="Of this record alone, by its number.")
@click.option("--payload", metavar="NAME", help="This one alone, such as prompt or stdout.")
@click.option("--why", default="", help="Goes on record.")
def erase(query: str, record: int | None, payload: str | None, why: str) -> None:
    """Remove the payloads of a QUERY for good. The journal still verifies, and says that they were erased."""
    from orchestrator import auditing
    from orchestrator.core.policy import PAYLOADS

    if payload not in (None, *PAYLOADS, *MORE_PAYLOADS):
        raise RequestError(f"--payload is one of {', '.join((*PAYLOADS, *MORE_PAYLOADS))}; not {payload[:32]!r}")
    if len(why) > 500:
        raise RequestError("--why has at most 500 characters")
    if payload is not None and record is None:
        raise RequestError("--payload is of a record: give its number with --record")
    count, clean = auditing.erase(settings.home(), query, record, payload, why)
    click.echo(f"{counted(count, 'payload')} erased", err=True)
    if not clean:
        click.echo("others still use the database, and what was erased is on its disk: run this again later", err=True)


@audit.command(name="score")
@click.argument("query")
@click.argument("score", type=_Score())
@click.option("--by", default="", help="Who says so.")
def score(query: str, score: Decimal, by: str) -> None:
    """Put on record how good the answer of a QUERY was, from 0 to 1."""
    from orchestrator import auditing

    if len(by) > 200:
        raise RequestError("--by has at most 200 characters")
    click.echo(f"query {auditing.score(settings.home(), query, score, by)} has a score of {score:f}", err=True)


@audit.command(name="follow")
@click.argument("query", default="last")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line: the record, with its payloads' texts.")
def follow(query: str, as_json: bool) -> None:
    """Print what happens in a QUERY while it happens, until it is closed or interrupted."""
    anyio.run(_follow, query, as_json)


async def _follow(query: str, as_json: bool) -> None:
    from orchestrator.auditing import follow, open_books
    from orchestrator.console import one_record

    with open_books(settings.home()) as books:
        async for record in follow(books, books.find(query), to_interruption=True):
            if as_json:
                fields = {"seq": record.seq, "at": record.at, "type": record.type, "node": record.node}
                say(sys.stdout, json.dumps({**fields, "body": record.body, "payloads": dict(record.payloads)}))
            else:
                for line in one_record(record):
                    say(sys.stdout, line)
