"""The frames of the channel: one JSON object a line, ASCII only, at most 16 MiB a line.

Host to guest: hello run reply interrupt bye.     Guest to host: ready output done call.
The same table checks frames on both sides: exact fields, exact types, every size bounded. What does not fit is
`Malformed`; the host then kills the sandbox, the supervisor kills the cell.
"""

from __future__ import annotations

from .lean import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Frame = dict[str, Any]
    # type of frame -> field -> permitted types; `type` itself is checked apart
    Table = Mapping[str, Mapping[str, tuple[type, ...]]]

VERSION = 2
MAX_LINE = 16 * 1024 * 1024  # bytes, newline included
MAX_ID = 2**53
OUTPUT_CHUNK = 32 * 1024  # characters of text in one output frame, at most
MAX_DETAIL = 2000  # characters that say how a cell ended
MAX_NAMES = 64  # new variables that are told
MAX_STRINGS = 2 * MAX_NAMES  # in a frame, its keys included
MAX_STRUCTURE = 2048  # bytes of a frame outside of its strings

_TEXT = (str, type(None))
_LIST = (list,)
_MAP = (dict,)

TO_GUEST: Table = {
    "hello": {"version": (int,), "limits": _MAP},
    "run": {"id": (int,), "code": (str,), "timeout_s": (int, float), "context": (bool,)},
    "reply": {"id": (int,), "ok": (bool,), "value": (str, dict, type(None)), "error": (dict, type(None))},
    "interrupt": {},
    "bye": {},
}
TO_HOST: Table = {
    "ready": {"version": (int,), "python": (str,)},
    "output": {"cell": (int,), "stream": (str,), "text": (str,)},
    "done": {
        "cell": (int,),
        "status": (str,),
        "detail": (str,),
        "answer": _TEXT,
        "names": _LIST,
        "dropped": (int,),
    },
    "call": {"id": (int,), "op": (str,), "prompt": (str,), "model": _TEXT, "context": (int, type(None))},
}
# Between supervisor and worker, inside the sandbox: what the worker says when a cell is over, or a snapshot is taken.
TO_SUPERVISOR: Table = {
    "call": TO_HOST["call"],
    "end": {"status": (str,), "detail": (str,), "answer": _TEXT, "names": _LIST},
    "snapshot": {},
}

CELL_STATUS = ("ok", "error", "timeout", "killed")
# context_*: a context for a child query, in as many pieces as it takes; the first one's reply says its number.
OPS = ("llm_query", "rlm_query", "budget", "context_text", "context_list", "context_more")
PIECE_CHARS = 1 << 20  # of a context in one call; a character takes up to 12 bytes of a line


class Malformed(ValueError):
    """A line that is not a frame. Its text names the rule that was broken, never the content."""


def encode(frame: Frame) -> bytes:
    """One line, newline included. Raises ValueError when it would be longer than MAX_LINE."""
    line = dumps(frame).encode("ascii") + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError("frame of %d bytes is larger than the %d that the channel carries" % (len(line), MAX_LINE))
    return line


def fits(frame: Frame) -> bool:
    """Whether `encode` would take it."""
    return len(dumps(frame)) < MAX_LINE


def decode(line: bytes, table: Table) -> Frame:
    """The frame in `line` (without its newline), checked against `table`. Raises Malformed."""
    if len(line) > MAX_LINE:
        raise Malformed("line too long")
    if not line.isascii():
        raise Malformed("not ASCII")
    if not _is_small_outside_of_strings(line):
        raise Malformed("more than a frame holds")
    try:
        frame: Any = loads(line.decode("ascii"))
    except (ValueError, RecursionError):
        raise Malformed("not JSON") from None
    if type(frame) is not dict:
        raise Malformed("not an object")
    return _checked(frame, table)  # pyright: ignore[reportUnknownArgumentType]


def _is_small_outside_of_strings(line: bytes) -> bool:
    """Whether parsing can cost no more than copying: 16 MiB of `[],` would take seconds and hundreds of megabytes.

    Backslashes are taken away two by two, then the quotes that one escapes: what is left delimits strings. Outside of
    strings a backslash is no JSON.
    """
    if b"\\" in line:
        line = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    if line.count(b'"') > 2 * MAX_STRINGS:
        return False
    return sum(map(len, line.split(b'"')[::2])) <= MAX_STRUCTURE


def _checked(frame: dict[Any, Any], table: Table) -> Frame:
    kind = frame.pop("type", None)
    if type(kind) is not str or kind not in table:
        raise Malformed("unknown type of frame")
    fields = table[kind]
    if frame.keys() != fields.keys():
        raise Malformed("fields of %s are not as agreed" % kind)
    for name, types in fields.items():
        _check(frame[name], types, "%s.%s" % (kind, name))
    frame["type"] = kind
    return frame


def _check(value: Any, types: tuple[type, ...], where: str) -> None:
    # type() and not isinstance(): True must not pass for a number.
    if type(value) not in types:
        raise Malformed("%s has the wrong type" % where)
    if type(value) is int and not 0 <= value <= MAX_ID:
        raise Malformed("%s is out of range" % where)
    if type(value) is str and not _is_text(value):
        raise Malformed("%s is not Unicode text" % where)
    if type(value) is list and not all(map(_is_short_text, value)):  # pyright: ignore[reportUnknownArgumentType]
        raise Malformed("%s is not a list of short texts" % where)


def _is_short_text(item: object) -> bool:
    return type(item) is str and len(item) <= 256 and _is_text(item)


def _is_text(value: str) -> bool:
    # A lone surrogate passes json.loads and then breaks every encoder that the text meets on the host.
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
