"""The C halves of standard modules, and JSON through its C half.

A sandbox starts in milliseconds because of what it does not import: the Python halves of json, socket, signal, typing
and threading take 10 to 20 ms together, most of it for enum and re. A cell that wants them imports them as ever.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    import ast
    import signal
    import socket
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, NoReturn

    _scan: Callable[[str, int], tuple[Any, int]]
    _chunks: Callable[[Any, int], Iterable[str]]
else:
    import _ast as ast
    import _signal as signal
    import _socket as socket
    from _collections_abc import Sequence

__all__ = ["Sequence", "ast", "dumps", "loads", "signal", "socket"]


def _no_constant(name: str) -> NoReturn:
    raise ValueError("JSON has no %s" % name)


def _not_json(value: object) -> NoReturn:
    raise TypeError("JSON cannot hold a %s" % type(value).__name__)


def loads(text: str) -> Any:
    """One JSON value and nothing else: no NaN, no space around it. Raises ValueError, RecursionError."""
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        raise ValueError("not JSON") from None
    if end != len(text):
        raise ValueError("more than one value")
    return value


def dumps(value: Any) -> str:
    """ASCII, without spaces. Raises TypeError, ValueError."""
    return "".join(_chunks(value, 0))


class _Rules:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_no_constant)


try:
    import _json

    _scan = _json.make_scanner(_Rules)  # pyright: ignore
    _chunks = _json.make_encoder(  # pyright: ignore
        None, _not_json, _json.encode_basestring_ascii, None, ":", ",", False, False, False
    )
except (ImportError, AttributeError, TypeError):  # another Python, whose C half looks different: the public face
    from json import JSONDecoder, JSONEncoder

    _scan = JSONDecoder(parse_constant=_no_constant).scan_once  # pyright: ignore
    _chunks = JSONEncoder(separators=(",", ":"), allow_nan=False, default=_not_json).iterencode  # pyright: ignore
