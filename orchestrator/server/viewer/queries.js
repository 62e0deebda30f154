/* The list of queries, newest first; while some of them run, it is kept as they are. */

import { get, isQuery, may, whoAmI } from "./api.js";
import { openAsk } from "./ask.js";
import { Bar, fill, make, moveByKeys, notKept, status } from "./dom.js";
import { greet, reportFaults } from "./shell.js";
import { counted, duration, line, nano, usd, when } from "./text.js";

const LOOK_MS = 2_000; // between two looks while something runs
const IDLE_MS = 15_000; // and while nothing does
const PAGE = 50;
const BUSY = ["queued", "running"];
const place = (id) => document.getElementById(id);

const asked = new URLSearchParams(location.search);
const filter = asked.get("status") ?? "";
const cursor = asked.get("cursor");
const rows = new Map();

function address(base, more) {
    const words = new URLSearchParams();
    for (const [name, value] of Object.entries(more)) if (value) words.set(name, value);
    return words.size ? `${base}?${words}` : base;
}

class Row {
    constructor(id) {
        this.cells = ["state", "what", "cost", "time", "at"].map((name) => make("td", { class: name }));
        this.link = make("a", { href: `/q/${id}` });
        this.gist = make("span", { class: "gist" });
        this.note = make("span", { class: "facts" });
        this.link.append(this.gist);
        this.cells[1].append(this.link, this.note);
        this.element = make("tr", {}, this.cells);
    }

    update(query) {
        const [state, , cost, time, at] = this.cells;
        if (this.status !== query.status) {
            this.status = query.status;
            fill(state, status(query.status));
        }
        fill(this.gist, query.question === null ? notKept("Question").textContent : line(query.question, 200) || "(no question)");
        fill(this.note, make("span", {}, line(query.model ?? "no model", 60)),
            query.sub_calls > 0 && make("span", {}, counted(query.sub_calls, "sub-call")));
        fill(cost, usd(nano(query.cost_usd)));
        cost.title = `${query.cost_usd} of ${query.limit_usd} USD`;
        const gone = query.duration_s ?? (query.status === "running" ? (Date.now() - Date.parse(query.created_at)) / 1000 : null);
        fill(time, gone === null ? "" : duration(gone));
        fill(at, make("time", { datetime: query.created_at }, when(query.created_at)));
    }
}

function show({ queries, next }) {
    const now = queries.filter((query) => isQuery(query.id));
    const ended = now.filter((query) => BUSY.includes(rows.get(query.id)?.status) && !BUSY.includes(query.status));
    now.forEach((query, index) => {
        let row = rows.get(query.id);
        if (!row) rows.set(query.id, (row = new Row(query.id)));
        row.update(query);
        // Moved only where it is elsewhere, so that what has the focus keeps it.
        const list = place("queries");
        if (list.children[index] !== row.element) list.insertBefore(row.element, list.children[index] ?? null);
    });
    for (const [id, row] of rows) {
        if (now.some((query) => query.id === id)) continue;
        row.element.remove();
        rows.delete(id);
    }
    if (ended.length) fill(place("told"), ended.map((query) => `${query.status}: ${line(query.question ?? query.id, 80)}. `));
    place("none").hidden = now.length > 0;
    fill(place("none"), filter ? `No query is ${filter}.` : cursor ? "There are no older queries." : "Nothing has been asked yet.");
    place("newest").hidden = !cursor;
    place("newest").href = address("/", { status: filter });
    place("older").hidden = !next;
    if (next) place("older").href = address("/", { status: filter, cursor: next });
    return now.some((query) => BUSY.includes(query.status));
}

const bars = new Map();

async function budgets() {
    const told = await get("/v1/budgets");
    for (const [name, label] of [["day", "Today"], ["month", "This month"]]) {
        const of = told[name];
        if (!of?.limit_usd) continue;
        if (!bars.has(name)) {
            bars.set(name, new Bar(label));
            place("budgets").append(bars.get(name).element);
        }
        const [limit, spent, held] = [of.limit_usd, of.spent_usd, of.held_usd].map(nano);
        const part = (amount) => (limit ? Number((amount * 1000n) / limit) / 1000 : 0);
        bars.get(name).update(`${usd(spent)}${held ? ` + ${usd(held)} held` : ""} of ${usd(limit)}`, part(spent), part(held));
    }
    place("budgets").hidden = !bars.size;
}

async function watch() {
    let busy = false;
    if (!document.hidden) {
        busy = show(await get(address("/v1/queries", { limit: PAGE, cursor, status: filter })));
        await budgets();
    }
    setTimeout(() => watch().catch(again), busy ? LOOK_MS : IDLE_MS);
}

function again(error) {
    place("fault").hidden = false;
    fill(place("fault"), error.message);
    setTimeout(() => {
        place("fault").hidden = true;
        watch().catch(again);
    }, IDLE_MS);
}

reportFaults();
place("status").value = filter;
place("status").addEventListener("change", () => location.assign(address("/", { status: place("status").value })));
greet(await whoAmI());
place("new").hidden = !may("query");
place("new").addEventListener("click", openAsk);
moveByKeys(() => document.querySelectorAll("#queries a"));
await watch().catch(again);
