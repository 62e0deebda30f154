"""What the viewer's modules make of texts and records, in the browser that runs them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from orchestrator.auditing import histories, open_books
from orchestrator.console import printable
from orchestrator.core.events import Recorded
from orchestrator.core.units import read_usd
from orchestrator.exports.tree import Cell, Node, grow
from orchestrator.loop.parse import parse
from tests.service import Served, ask
from tests.visits import Visit, visiting

CODE = '''
@decorated.twice
def f(x: int = 0x1F, *, y=1_000.5e-3j) -> str:  # it's "a" comment
    """Doc \\""" string
    over lines."""
    return rb'raw\\'' + f"{x!r:>{y}}" if x is not None else llm_query('a' "b")
'''


@pytest.fixture(scope="module")
def modules(chromium: Browser, service: Served) -> Iterator[Visit]:
    with visiting(chromium, service) as visit:
        visit.go("/login")
        yield visit


def run(visit: Visit, module: str, expression: str, *given: Any) -> Any:
    """`expression` of a module's names, as `m`, and of `given`."""
    return visit.page.evaluate(
        f"async (given) => {{ const m = await import('/static/{module}.js'); {expression} }}", given
    )


def test_what_is_escaped_is_what_the_console_escapes(modules: Visit):
    codes = [code for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    shown = run(modules, "text", "return given[0].map((code) => m.printable(String.fromCharCode(code)));", codes)
    assert shown == [printable(chr(code)) for code in codes]
    hidden = [code for code in codes if unicodedata.bidirectional(chr(code)) in ("LRE", "RLE", "PDF", "LRO", "RLO")]
    assert len(hidden) == 5
    assert all(shown[codes.index(code)].startswith("\\u") for code in hidden)


@pytest.mark.parametrize(
    "code",
    [
        CODE,
        "",
        "'",
        '"""',
        "'''\\",
        "x = '\\",
        "r'\\'",
        "\ud83d\ude00 = 1",
        "é = ñ(2)",
        "1__0..e5.j",
        "@",
        "f''''''",
        "#\r\n#",
    ],
)
def test_a_tokenizer_loses_nothing(modules: Visit, code: str):
    given = code.encode("utf-16", "surrogatepass").decode("utf-16")
    found = run(modules, "python", "return [...m.tokens(given[0])];", given)
    assert "".join(text for _kind, text in found) == given
    assert all(text for _kind, text in found)


def test_what_is_coloured(modules: Visit):
    found = run(modules, "python", "return [...m.tokens(given[0])].filter(([kind]) => kind);", CODE)
    assert found == [
        ["decorator", "@decorated.twice"],
        ["keyword", "def"],
        ["call", "f"],
        ["number", "0x1F"],
        ["number", "1_000.5e-3j"],
        ["comment", '# it\'s "a" comment'],
        ["string", '"""Doc \\""" string\n    over lines."""'],
        ["keyword", "return"],
        ["string", "rb'raw\\''"],
        ["string", 'f"{x!r:>{y}}"'],
        ["keyword", "if"],
        ["keyword", "is"],
        ["keyword", "not"],
        ["keyword", "None"],
        ["keyword", "else"],
        ["ours", "llm_query"],
        ["string", "'a'"],
        ["string", '"b"'],
    ]


@pytest.mark.parametrize(
    "piece", ["'", '"', "'''\\", '"""\\\n', "rb'\\", "1_", "@a.", "\\", "#", "e'", "'''\"\"\"", "f" * 9 + "'"]
)
def test_no_code_takes_long(modules: Visit, piece: str):
    """Each character is looked at a few times, whatever comes after it: twice the code, twice the time."""
    measure = """
        const took = given.map((code) => {
            const begun = performance.now();
            for (const token of m.tokens(code));
            return performance.now() - begun;
        });
        return Math.max(...took);
    """
    assert run(modules, "python", measure, (piece * 40_000)[:40_000]) < 1000


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (4_000, "$0.000004"),
        (19_600_000, "$0.02"),
        (54_492_000, "$0.054"),
        (120_000_000, "$0.12"),
        (999_999_999, "$1.00"),
        (1_234_567_890, "$1.23"),
        (1_234_567 * 10**9, "$1,234,567.00"),
    ],
)
def test_money(modules: Visit, amount: int, shown: str):
    assert run(modules, "text", "return m.usd(BigInt(given[0]));", str(amount)) == shown


@pytest.mark.parametrize(
    ("text", "amount"), [("0.000000001", 1), ("12.50", 12_500_000_000), ("1e9", 0), ("", 0), (None, 0)]
)
def test_money_is_read_exactly(modules: Visit, text: str | None, amount: int):
    assert run(modules, "text", "return String(m.nano(given[0]));", text) == str(amount)


@pytest.mark.parametrize(
    "reply",
    [
        "First.\n```repl\nprint(1)\n```\nThen.\n~~~python\nx = '```'\n~~~",
        "```repl\nnever closed",
        "```json\n{}\n```\nFINAL(4711)",
        "a\r```py\r\nb\r\n```\rc",
    ],
)
def test_what_is_said_besides_cells(modules: Visit, reply: str):
    """All that no cell has, and nothing that one has."""
    said = run(modules, "text", "return m.prose(given[0]);", reply)
    cells = parse(reply).cells
    assert not any(cell in said for cell in cells)
    ours = ("```repl", "```py", "~~~python", "~~~") if cells else ()
    rows = [
        row for row in reply.replace("\r\n", "\n").replace("\r", "\n").split("\n") if not row.startswith(ours or "\0")
    ]
    left = [row for row in rows if row.strip("`") and row not in "\n".join(cells).split("\n")]
    assert [row for row in said.split("\n") if row.strip("`")] == left


def test_what_belongs_together_is_what_exports_say(modules: Visit):
    """Of a real query with sub-calls, a child query and an error."""
    service = modules.service
    with service.client() as client:
        query = ask(client, context={"text": "\n\n".join(f"report {n}: all was well" for n in range(40))})["id"]
    with open_books(service.airlock.home) as books:
        (records,) = histories(books, query)
    found = run(modules, "records", _SHAPE, json.dumps([_told(record) for record in records]))
    grown = grow(records)
    assert grown
    assert found["nodes"] == {name: _shape(node) for name, node in grown.nodes.items()}
    assert list(found["nodes"]) == ["root", "root.1", "root.1.1"]
    assert found["spent"] == str(read_usd(records[-1].body["cost_usd"]))


_SHAPE = """
    const tree = new m.Tree();
    for (const record of JSON.parse(given[0])) tree.take(record), tree.take(record);
    const of = (asked) => asked.kind === "call" ? asked.name : asked.kind === "node" ? asked.name : asked.record.type;
    const shape = (node) => ({
        status: node.ended?.body.status ?? "open",
        turns: node.turns.map((turn) => ({
            calls: turn.calls.map((call) => call.name),
            cells: turn.cells.map((cell) => ({ status: cell.ended?.body.status, asked: cell.asked.map(of) })),
        })),
    });
    const nodes = Object.fromEntries([...tree.nodes].map(([name, node]) => [name, shape(node)]));
    return { nodes, spent: String(tree.spent) };
"""


def _told(record: Recorded) -> dict[str, Any]:
    names = ("seq", "at", "type", "node", "body", "payloads")
    return {name: getattr(record, name) for name in names}


def _shape(node: Node) -> dict[str, Any]:
    turns = [
        {"calls": [call.name for call in turn.calls], "cells": [_cell(cell) for cell in turn.cells]}
        for turn in node.turns
    ]
    return {"status": node.status, "turns": turns}


def _cell(cell: Cell) -> dict[str, Any]:
    asked = [one.type if isinstance(one, Recorded) else one.name for one in cell.asked]
    return {"status": cell.ending["status"], "asked": asked}


def test_a_page_holds_only_so_much_of_a_query(modules: Visit):
    """Five thousand sub-calls in one cell, and three hundred turns: what is drawn has a bound, and more can be had."""
    told = modules.page.evaluate(_LONG)
    assert told["records"] == 11_200
    assert told["calls"] == 5_000
    assert told["elements"] < 5_000
    assert 40 <= told["turns"] <= 160
    assert told["more"] == told["turns"] + 50
    assert told["last"] == "Turn 300"
    assert told["frames_ms"] < 2_000  # a page that freezes takes minutes for this


_LONG = """async () => {
    const { Tree } = await import("/static/records.js");
    const { Timeline } = await import("/static/timeline.js");
    const place = document.createElement("div");
    document.body.append(place);
    let drawn = 0;
    const tree = new Tree((part) => timeline.changed(part));
    const timeline = new Timeline(place, "", tree, () => drawn++);
    let seq = 0, call = 0;
    const take = (type, body, payloads = {}) =>
        tree.take({ seq: seq++, at: "2026-11-26T01:20:29.000Z", type, node: "root", body, payloads });
    const ask = (role, prompt, completion) => {
        const body = { call: `root.c${++call}`, attempt: 1, role, model: "m", messages: 1, shared: 0 };
        take("call.intent", body, { prompt: JSON.stringify([{ role: "user", content: prompt }]) });
        const usage = { input_tokens: 1, output_tokens: 1 };
        const result = { call: body.call, outcome: "answered", detail: "stop", cost_usd: "0.01", usage };
        take("call.result", result, { completion });
    };
    const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    let longest = 0;
    for (let turn = 1; turn <= 300; turn++) {
        ask("root", "go on", "Next.");
        take("cell.started", { cell: turn }, { code: "print('x' * 20_000)" });
        if (turn === 290) for (let i = 0; i < 5_000; i++) ask("sub", `${i} `.repeat(2_000), "no");
        const ended = { cell: turn, status: "ok", detail: "", names: [], dropped_bytes: 0, duration_ms: 1 };
        take("cell.ended", { ...ended, answered: false }, { stdout: "x".repeat(20_000) });
        if (turn % 20 === 0) {
            const begun = performance.now();
            await frame();
            longest = Math.max(longest, performance.now() - begun);
        }
    }
    await frame();
    const turns = place.querySelectorAll(".turn").length;
    const elements = place.querySelectorAll("*").length;
    place.querySelector("button.more").click();
    await frame();
    const all = place.querySelectorAll(".turn");
    const found = {
        records: seq, calls: tree.subCalls, elements, turns, more: all.length, frames_ms: longest,
        last: all[all.length - 1].getAttribute("aria-label"),
    };
    place.remove();
    return found;
}"""
