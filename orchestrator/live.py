"""The live view of a query on a terminal. Code and output are hostile text: see `printable`."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from orchestrator.console import Bounds, Counts, counted, one_line, printable
from orchestrator.core.events import Event
from orchestrator.core.units import usd
from orchestrator.proxy.account import Account

_CODE_LINES, _OUTPUT_LINES = 16, 8
_WIDE = 72  # columns that three of the head beside each other take


class LiveView:
    """Turn, code, output, sub-calls in flight, money and time left; redrawn as things happen."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._query: tuple[Bounds, Counts] | None = None
        self._code = ""
        self._tail: deque[str] = deque(maxlen=_OUTPUT_LINES)
        self._open_line = ""
        self._cell = 0
        self._doing = "starting"
        self._started = time.monotonic()
        # Last, as it draws at once.
        self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=8, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def account(self, account: Account) -> None:
        self.begin(Bounds.of(account.key.id, account.policy), account)

    def begin(self, bounds: Bounds, counts: Counts) -> None:
        self._query = bounds, counts

    def event(self, event: Event) -> None:
        body = event.body
        if event.type == "call.intent" and body["role"] == "root":
            self._doing = f"{body['model']} is thinking"
        elif event.type == "call.result" and body["outcome"] != "answered":
            self._doing = f"call {body['call']}: {body['detail']}"
        elif event.type == "cell.started":
            self._cell, self._code = body["cell"], event.payloads.get("code", "")
            self._tail.clear()
            self._open_line = ""
            self._doing = f"cell {self._cell} is running"
        elif event.type == "cell.ended":
            self._doing = f"cell {body['cell']} ended: {body['status']} after {body['duration_ms']} ms"
        elif line := one_line(event):
            self._doing = line
        self._live.refresh()

    def output(self, stream: str, text: str) -> None:
        *lines, self._open_line = (self._open_line + text)[-10_000:].split("\n")
        self._tail.extend(lines)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [self._head()]
        if self._code:
            lines = printable(self._code).splitlines()
            shown = "\n".join(lines[:_CODE_LINES]) + ("\n..." if len(lines) > _CODE_LINES else "")
            code = Syntax(shown, "python", theme="ansi_dark", background_color="default", word_wrap=True)
            parts.append(Panel(code, title=f"cell {self._cell}", title_align="left", border_style="dim"))
        tail = [*self._tail, *([self._open_line] if self._open_line else [])][-_OUTPUT_LINES:]
        if tail:
            width = max(20, self._console.width - 6)
            text = Text("\n".join(printable(line)[:width] for line in tail))
            parts.append(Panel(text, title="output", title_align="left", border_style="dim"))
        return Group(*parts)

    def _head(self) -> RenderableType:
        if self._query is None:
            return Text("airlock: starting")
        (bounds, counts), elapsed = self._query, time.monotonic() - self._started
        total = (bounds.time_ms or 0) / 1000
        turns = f"turn {counts.turns}" + (f" of {bounds.iterations}" if bounds.iterations else "")
        calls = f"{counted(counts.sub_calls, 'sub-call')}, {counted(counts.running, 'call')} in flight"
        if counts.children:
            calls = f"{counts.children} child {'query' if counts.children == 1 else 'queries'}, {calls}"
        money = f"{usd(counts.spent)} of {usd(bounds.limit)} USD"
        clock = f"{elapsed:.0f}" + (f" of {total:.0f} s" if total else " s")
        doing = Text(printable(self._doing)[:70], style="cyan")
        if self._console.width < _WIDE:
            lines = (turns, calls, money, clock)
            return Group(Text(bounds.query, style="bold"), *(Text(line) for line in lines), doing)
        table = Table.grid(padding=(0, 2))
        table.add_row(Text(bounds.query, style="bold"), Text(turns), Text(calls))
        spent = ProgressBar(total=max(1, bounds.limit), completed=counts.spent, width=20)
        table.add_row(Text(money), spent, doing)
        if total:
            table.add_row(Text(clock), ProgressBar(total=total, completed=min(elapsed, total), width=20))
        return table
