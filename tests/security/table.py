"""The table of attacks by backend, as tests print it and SECURITY.md keeps it.

Written anew into SECURITY.md by `python -m tests.security.table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.sandboxes import BACKENDS
from tests.security.frame import Attack

SECURITY = Path(__file__).parents[2] / "SECURITY.md"
BEGIN, END = "<!-- attacks -->\n", "<!-- /attacks -->\n"


def promised(attacks: list[Attack]) -> dict[tuple[str, str, str], str]:
    """What every test has to find."""
    return {(each.group, each.name, backend): each.word(backend) for each in attacks for backend in BACKENDS}


def render(outcomes: Mapping[tuple[str, str, str], str]) -> str:
    """Markdown that reads well as text, too."""
    rows = [("group", "attack", *BACKENDS)]
    for group, name in dict.fromkeys(key[:2] for key in outcomes):
        rows.append((group, name, *(outcomes.get((group, name, backend), "-") for backend in BACKENDS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def kept() -> str:
    """The table that SECURITY.md has."""
    return SECURITY.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    from tests.security.attacks import ATTACKS

    text = SECURITY.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    SECURITY.write_text(before + BEGIN + render(promised(ATTACKS)) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
