"""Write a text of ordinary words with one line in it that matters: the context of `make demo`.

    python tests/examples/make_haystack.py haystack.txt --size 10000000 --seed 7

The same size and seed give the same text everywhere. The number to be found goes to stdout, where it lies to stderr.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

NEEDLE = "The magic number is {number}.\n"
WORDS_A_LINE = 12
# No digits and no word of the needle: a search for any of them has one hit.
WORDS = """
about above across after again along almost among another apple around autumn basket because before behind below
beside better between bird border bottle branch bread bridge bright brother building butter button candle carpet
carry castle center chair change circle city climb clock cloud coffee color common copper corner cotton country
cover cross dance dark distance door dream driver early earth engine evening every family farmer father feather
field finger flower follow forest forward friend garden gentle glass grass green ground harbor harvest heavy hill
honey horse house hundred island journey kitchen ladder lake lantern leather letter light little market meadow
middle mirror morning mother mountain music narrow never night north ocean office orange other paper people pepper
picture plain pocket quiet rain river road roof round sailor salt school season shadow silver simple sister sky slow
small smoke snow south spring stone story street summer table teacher thread tower travel tree under valley village
water weather west wheat where while white wind window winter without wooden yellow
""".split()  # noqa: SIM905 - a list of 150 quoted words is harder to read


@dataclass(frozen=True, slots=True)
class Haystack:
    """text, the number in its needle, and where the needle's line begins: position in characters, line from 1."""

    text: str
    number: int
    position: int
    line: int


def haystack(size: int, seed: int) -> Haystack:
    """A text of exactly `size` characters. The needle's line is anywhere in it, each line as likely as the next.

    Raises ValueError when the needle does not fit.
    """
    rng = random.Random(seed)  # noqa: S311 - the same text everywhere is what is wanted
    number = rng.randrange(1_000_000, 10_000_000)
    needle = NEEDLE.format(number=number)
    room = size - len(needle)
    if room < 0:
        raise ValueError(f"a text of {size} characters has no room for a needle of {len(needle)}")

    words = rng.choices(WORDS, k=room // 4 + 1)  # a word and its separator are four characters at least
    lines = (" ".join(words[at : at + WORDS_A_LINE]) for at in range(0, len(words), WORDS_A_LINE))
    hay = "\n".join(lines)[: max(room - 1, 0)] + "\n" * min(room, 1)

    line = rng.randrange(hay.count("\n") + 1)
    position = sum(len(text) for text in hay.splitlines(keepends=True)[:line])
    return Haystack(hay[:position] + needle + hay[position:], number, position, line + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a text with one line in it that matters.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=int, default=10_000_000, help="characters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args()
    try:
        made = haystack(options.size, options.seed)
        options.file.write_text(made.text, encoding="ascii", newline="\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(made.number)
    print(f"hidden at character {made.position:,} of {len(made.text):,}, line {made.line:,}", file=sys.stderr)


if __name__ == "__main__":
    main()
