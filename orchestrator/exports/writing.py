"""Queries into a file, in the formats of others. The file is there whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from io import TextIOWrapper
from pathlib import Path
from typing import Literal, TextIO, get_args

from orchestrator import files
from orchestrator.core.errors import RequestError
from orchestrator.core.events import Recorded
from orchestrator.exports import chat, ocsf, rlms

Format = Literal["otlp", "ocsf", "rlms", "chat"]
FORMATS: tuple[Format, ...] = get_args(Format)
Histories = Iterable[Sequence[Recorded]]


@dataclass(frozen=True, slots=True)
class Options:
    """content: texts in `otlp`, and code in `ocsf`. scores: by query, from 0 to 1. status, least: of `chat` alone."""

    content: bool = False
    scores: Mapping[str, Decimal] = field(default_factory=dict[str, Decimal])
    status: str | None = None
    least: Decimal | None = None


@dataclass(slots=True)
class Written:
    """left_out: turns whose texts are not all kept (`chat`), and records of a type that is not known (`ocsf`)."""

    queries: int = 0
    lines: int = 0
    left_out: int = 0


PLAIN = Options()


def write(name: Format, queries: Histories, out: TextIO, options: Options = PLAIN) -> Written:
    """All queries' lines. A file is best had from `draft`. Raises RequestError."""
    lines, done = _lines(name, options), Written()
    for history in queries:
        done.queries += 1
        if name == "rlms" and done.queries > 1:
            raise RequestError("a trace of rlms holds one query: name the one that you want")
        for line in lines(history):
            if line is None:
                done.left_out += 1
            else:
                out.write(line)
                done.lines += 1
    return done


def send(queries: Histories, endpoint: str, *, content: bool = False) -> int:
    """Spans to a collector; how many it took. Raises RequestError."""
    try:
        from orchestrator.exports import otlp
    except ImportError as error:
        raise _without_otel(error) from None
    return otlp.send(queries, endpoint, content=content)


@contextmanager
def draft(path: Path) -> Generator[TextIO]:
    """See `files.draft`; of text. Raises RequestError."""
    try:
        # Half of a surrogate pair is no text: what gets here all the same is no reason to lose the rest.
        with files.draft(path) as out:
            text = TextIOWrapper(out, "utf-8", errors="replace", newline="\n")
            try:
                yield text
            finally:
                text.detach()  # which flushes it; `out` is closed by whoever opened it
    except files.Unwritable as why:
        raise RequestError(f"cannot write {path}: {why}") from None


def _lines(name: Format, options: Options) -> Callable[[Sequence[Recorded]], Iterator[str | None]]:
    match name:
        case "otlp":
            try:
                from orchestrator.exports import otlp
            except ImportError as error:
                raise _without_otel(error) from None
            return lambda history: otlp.lines(history, content=options.content)
        case "ocsf":
            return lambda history: ocsf.lines(history, content=options.content)
        case "rlms":
            return rlms.lines
        case "chat":
            wanted = chat.Wanted(options.status, options.least)
            return lambda history: chat.lines(history, options.scores, wanted)


def _without_otel(error: ImportError) -> RequestError:
    return RequestError(f"OpenTelemetry cannot be loaded: {error}; install Airlock again, with the extra `otel`")
