"""Secrets are taken out of texts before these are stored.

What the texts of a query hold is not for us to judge, but keys that happen to be in them must not live on in a journal.
This finds what looks like one, and what this process knows to be one. It is no barrier against a guest who wants a
secret in the journal: whoever has one can write it backwards.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterable, Iterator

from ahocorasick_rs import BytesAhoCorasick, Implementation

from orchestrator.core.secret_forms import FORMS, Form

SHORTEST = 8  # characters of a literal: what is shorter is found in ordinary text
_WINDOW = 1 << 18  # bytes that are searched at once, so that a hostile text's many anchors fill no memory
_ROUNDS = 4  # a token that nothing parted from what stood before it stands alone when that is gone
_KNOWN = "known secret"


def mark(kind: str) -> str:
    """What stands where a secret was."""
    return f"[redacted: {kind}]"


class Redactor:
    """literals: secrets that this process holds, found as they are, JSON-escaped and URL-quoted.

    Those of fewer than SHORTEST characters are not looked for (a server on this machine takes `none` for a key), nor
    one that a mark has in it.
    """

    def __init__(self, literals: Iterable[str] = ()) -> None:
        marks = mark(_KNOWN) + "".join(mark(form.kind) for form in FORMS)
        known = [spelt for literal in literals if len(literal) >= SHORTEST for spelt in _spellings(literal)]
        self._literals = [literal.encode("utf-8", "surrogatepass") for literal in known if literal not in marks]
        self._found: list[Form | bytes] = [form for form in FORMS for _anchor in form.anchors]
        self._found += self._literals
        anchors = [anchor.encode() for form in FORMS for anchor in form.anchors]
        anchors += [literal.lower() for literal in self._literals]
        self._longest = max(map(len, anchors))
        # All in one pass: a search for each anchor costs five times as much.
        self._anchors = BytesAhoCorasick(anchors, implementation=Implementation.DFA)

    def redact(self, text: str) -> tuple[str, int]:
        """The text with a mark in place of each secret, and how many there were. Doing it again changes nothing."""
        data, count = text.encode("utf-8", "surrogatepass"), 0
        for _ in range(_ROUNDS):
            spans = self._spans(data)
            if not spans:
                break
            data, count = _without(data, spans), count + len(spans)
        return (data.decode("utf-8", "surrogatepass"), count) if count else (text, 0)

    def _spans(self, data: bytes) -> list[tuple[int, int, str]]:
        """(start, end, kind) of what goes, in order."""
        spans: list[tuple[int, int, str]] = []
        last = 0
        for start, behind, found in self._hits(data.lower()):
            if isinstance(found, bytes):
                if data[start:behind] != found:  # in another case
                    continue
                begin, end, kind = start, behind, _KNOWN
                if begin < last:
                    earlier, _, kind = spans.pop()
                    begin, end = min(begin, earlier), max(end, last)
            elif start >= last and (match := found.pattern.match(data, behind if found.behind else start)):
                begin, end = match.span(match.lastindex or 0)
                kind = found.kind
                if not found.check(data[begin:end]):
                    continue
            else:
                continue
            spans.append((begin, end, kind))
            last = end
        return spans

    def _hits(self, folded: bytes) -> Iterator[tuple[int, int, Form | bytes]]:
        """(where an anchor begins and ends, what may be there), in order of place."""
        for begin in range(0, len(folded), _WINDOW):
            window = folded[begin : begin + _WINDOW + self._longest - 1]
            hits = self._anchors.find_matches_as_indexes(window, overlapping=True)
            for which, start, end in sorted(hits, key=_by_place):
                if start < _WINDOW:  # else it is the next one's
                    yield begin + start, begin + end, self._found[which]


def excerpt(text: str, most: int, redact: Callable[[str], tuple[str, int]] | None) -> str:
    """At most `most` characters of it, without secrets: of one that is cut first, a half stays.

    redact: as a Redactor does; None where the text is one of our own. Doing it again changes nothing.
    """
    if redact is None:
        return text[:most]
    text = redact(text)[0][:most]
    return redact(text)[0][:most]  # what a cut has parted from the rest may look like one


def _without(data: bytes, spans: list[tuple[int, int, str]]) -> bytes:
    kept: list[bytes] = []
    at = 0
    for start, end, kind in spans:
        kept += data[at:start], mark(kind).encode()
        at = end
    return b"".join([*kept, data[at:]])


def _spellings(literal: str) -> set[str]:
    """How it is written in a text, in JSON, and in a URL."""
    escaped = json.dumps(literal, ensure_ascii=False)[1:-1]
    return {literal, escaped, json.dumps(literal)[1:-1], urllib.parse.quote(literal, safe="", errors="replace")}


def _by_place(hit: tuple[int, int, int]) -> tuple[int, int]:
    """Of two anchors in one place, the longer one tells more."""
    _which, start, end = hit
    return start, -end
