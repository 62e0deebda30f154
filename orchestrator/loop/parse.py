"""What a reply of the root LM means: cells to run, a final answer, both or neither. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"\r\n?|\n")  # as Python splits code; str.splitlines would also cut at \x0c or \u2028
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*(\w*)[^\n]*$")
_CELL_LANGUAGES = ("repl", "python", "py")
_FINAL = re.compile(r"^[ \t>*]*FINAL(_VAR)?\**[ \t]*\(", re.MULTILINE)
_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_QUOTES = ('"""', "'''", '"', "'")


@dataclass(frozen=True, slots=True)
class Step:
    """cells: code in order. final: the text of FINAL(...), or None. final_var: the name in FINAL_VAR(...), or None."""

    cells: tuple[str, ...]
    final: str | None = None
    final_var: str | None = None


def parse(text: str) -> Step:
    """The step that a reply asks for.

    A cell is a fenced block of language repl, python or py. A fence that is never closed ends with the reply, as models
    that hit their output limit leave it. FINAL counts only at the start of a line outside cells, so that speaking about
    it, or calling it in code, does not end the query.
    """
    cells: list[str] = []
    prose: list[str] = []
    fence, language, block = "", "", list[str]()
    lines = _LINE.split(text)
    for number, line in enumerate(lines):
        if not fence and _FINAL.match(line) and line.count("(") > line.count(")"):
            prose += lines[number:]  # an answer of several lines, which may hold fences of its own
            break
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, block = match[1], match[2].lower(), []
        elif fence and match and match[1].startswith(fence) and not match[2]:
            _take(block, language, cells, prose)
            fence = ""
        elif fence:
            block.append(line)
        else:
            prose.append(line)
    if fence:
        _take(block, language, cells, prose)
    final, final_var = _final("\n".join(prose))
    return Step(tuple(cells), final, final_var)


def _take(block: list[str], language: str, cells: list[str], prose: list[str]) -> None:
    code = "\n".join(block)
    if language in _CELL_LANGUAGES and code.strip():
        cells.append(code)
    elif _FINAL.match(code.strip()):  # an answer that was fenced for show
        prose.extend(block)


def _final(prose: str) -> tuple[str | None, str | None]:
    """The last FINAL or FINAL_VAR in the text."""
    found = list(_FINAL.finditer(prose))
    if not found:
        return None, None
    match = found[-1]
    inside = _inside(prose[match.end() :])
    if match[1]:
        name = _unquoted(inside)
        return (None, name) if _NAME.match(name) else (None, None)
    return _unquoted(inside), None


def _inside(text: str) -> str:
    """Up to the closing parenthesis that balances the opening one; to the end when there is none."""
    depth = 1
    for position, character in enumerate(text):
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            # An answer may hold an unbalanced parenthesis of its own: `FINAL(a) b)` ends at the last one of its line.
            if not depth:
                rest = text[position + 1 :].split("\n", 1)[0]
                more = rest.count(")") > rest.count("(")
                return text[: position + 1 + rest.rindex(")")] if more else text[:position]
    return text


def _unquoted(text: str) -> str:
    text = text.strip()
    for quote in _QUOTES:
        if len(text) >= 2 * len(quote) and text.startswith(quote) and text.endswith(quote):
            inside = text[len(quote) : -len(quote)]
            # `"a" and "b"` begins and ends with a quote, but is not one quoted text.
            return text if quote in inside.replace("\\" + quote, "") else inside
    return text
