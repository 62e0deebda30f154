"""Why a reservation was refused: the limit that waiting would not move, if there is one, else the one to wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core.errors import BudgetExhausted, BudgetInFlight, CountExceeded, LimitError, RateLimited
from orchestrator.core.units import usd
from orchestrator.store.scope import LIMITS, Scope

ONE_ENDS_S = 0.1  # when to ask again for what a call in flight may give back: it can be any moment
_NAMES = {"calls": "request", "tokens": "token", "in_flight": "call in flight", "children": "child query"}
_PLURALS = {"call in flight": "calls in flight", "child query": "child queries"}


@dataclass(frozen=True, slots=True)
class Book:
    """What a scope has of its limits. used: by limit, what is held included. firm: the part that never comes free."""

    scope: Scope
    used: Mapping[str, int]
    firm: Mapping[str, int]

    def left(self, what: str) -> int:
        return self.scope.most(what) - self.used[what]

    def refuses(self, what: str, asked: int) -> bool:
        return asked > self.left(what)

    def for_good(self, what: str, asked: int) -> bool:
        """Whether it refuses whatever calls in flight give back, and whenever one comes again."""
        most = self.scope.most(what)
        return self.firm[what] + asked > most and (asked > most or not _of_a_minute(self.scope, what))


def _of_a_minute(scope: Scope, what: str) -> bool:
    return scope.minute is not None and what in ("calls", "tokens")


def refusal(books: Sequence[Book], asked: Mapping[str, int], now: float) -> tuple[LimitError, int]:
    """The refusal that says most; where it is one of money, the nano-USD that every scope has room for, else 0.

    asked: by limit. now: seconds of the epoch.
    """
    refusing = [(book, what) for what in LIMITS for book in books if book.refuses(what, asked[what])]
    firm = [(book, what) for book, what in refusing if book.for_good(what, asked[what])]
    what = (firm or refusing)[0][1]
    # The tightest: where another one has more, to raise that would change nothing.
    book = min((book for book, other in firm or refusing if other == what), key=lambda book: book.left(what))
    if what == "limit":
        free = max(0, min(book.left("limit") for book in books))
        return _money(book, asked[what], exhausted=bool(firm)), free
    return _count(book.scope, what, asked[what], book.left(what), now, for_good=bool(firm)), 0


def _money(book: Book, amount: int, *, exhausted: bool) -> LimitError:
    scope, held = book.scope, book.used["held"]
    fields = {"limit": scope.most("limit"), "asked": amount, "left": book.left("limit")}
    shown = {name: f"{usd(value)} USD" for name, value in fields.items()}
    kind = BudgetExhausted if exhausted else BudgetInFlight
    return kind(
        f"this call could cost {shown['asked']}, and the {scope.title} budget of {shown['limit']} "
        f"has {shown['left']} left" + (f" ({usd(held)} USD held by calls in flight)" if held else ""),
        **shown,
        rule=scope.rule("limit"),
    )


def _count(scope: Scope, what: str, asked: int, left: int, now: float, *, for_good: bool) -> LimitError:
    most, name = scope.most(what), _NAMES[what]
    minute = scope.minute if _of_a_minute(scope, what) else None
    per = " of this minute" if minute else ""
    fields = {"limit": _some(most, name) + per, "asked": _some(asked, name), "left": _some(max(0, left), name)}
    fields["rule"] = scope.rule(what)
    if for_good and asked > most:
        text = f"this needs {fields['asked']}, and {scope.owner} limit is {_some(most, name)}"
        return CountExceeded(text + (" a minute: ask for less" if minute else ": ask for less"), **fields)
    text = f"{scope.owner} {fields['limit']} are used up"
    if left > 0:
        text = f"this needs {fields['asked']}, and of {scope.owner} {fields['limit']} {left:,} are left"
    if for_good:
        return CountExceeded(text, **fields)
    if minute:
        wait = max(0.0, minute.timestamp() + 60 - now)
        return RateLimited(f"{text}: come back in {wait:.0f} s", retry_after=wait, **fields)
    return RateLimited(f"{text}: come back when one has ended", retry_after=ONE_ENDS_S, **fields)


def _some(count: int, name: str) -> str:
    return f"{count:,} {name if count == 1 else _PLURALS.get(name, name + 's')}"
