/* A query as it went: turns, their cells and output, sub-calls and child queries. Drawn once a frame, and never more of
it at once than a page can hold. */

import { recordOf } from "./api.js";
import { button, fill, long, make, notKept, status } from "./dom.js";
import { highlighted } from "./python.js";
import { replies, statusOf } from "./records.js";
import { bytes, counted, duration, lastMessage, line, nano, number, printable, prose, usd, when } from "./text.js";

const ITEMS = 40; // turns and notes of a node that are on the page to begin with, the newest
const ASKED = 8; // sub-calls of a cell, and child queries: the first of each
const MORE = 50; // of any of these, with each press of a button

export class Timeline {
    #views = new Map();
    #dirty = new Set();
    #due = false;

    /* query: the id. records: what belongs together. drawn: called after each frame. */
    constructor(place, query, tree, drawn) {
        this.place = place;
        this.query = query;
        this.tree = tree;
        this.drawn = drawn;
    }

    changed(part) {
        this.#dirty.add(part);
        if (this.#due) return;
        this.#due = true;
        requestAnimationFrame(() => this.#draw());
    }

    /* The view of a part that is on the page; made by `make_` where there is none. */
    view(part, make_) {
        let view = this.#views.get(part);
        if (!view) this.#views.set(part, (view = make_()));
        return view;
    }

    forget(part) {
        this.#views.delete(part);
    }

    /* Go to a node on the page, opening what it is within. */
    reveal(node) {
        if (!node.within) {
            this.place.querySelector(".turn")?.focus();
            return;
        }
        this.#open(node);
        const { element } = this.#views.get(node) ?? {};
        element?.querySelector("summary").focus();
        element?.scrollIntoView({ block: "start" });
    }

    #open(node) {
        if (node.parent?.within) this.#open(node.parent);
        this.#views.get(node.within)?.show(node);
        const view = this.#views.get(node);
        if (!view) return; // of a turn that is not on the page
        view.element.open = true;
        view.fillBody();
    }

    #draw() {
        this.#due = false;
        const parts = [...this.#dirty];
        this.#dirty.clear();
        const { root } = this.tree;
        if (root && !this.items) {
            this.items = new Items(this, root);
            fill(this.place, this.items.element);
        }
        for (const part of parts) {
            if (part === root) this.items.update();
            else this.#views.get(part)?.update();
        }
        this.drawn();
    }
}

/* A payload of a record, whatever its length. */
function payload(timeline, record, name, options = {}) {
    const found = record.texts[name];
    if (!found) return timeline.tree.keeps(name) ? null : notKept(options.absent ?? options.label ?? name);
    const whole = async () => {
        const text = (await recordOf(timeline.query, record.seq)).payloads[name] ?? "";
        return name === "prompt" ? lastMessage(text) : text;
    };
    return long(found.text, { length: found.length, whole, label: name, ...options });
}

/* A node's turns and notes, the newest of them. */
class Items {
    constructor(timeline, node) {
        this.timeline = timeline;
        this.node = node;
        this.first = null;
        this.next = 0;
        this.list = make("div", { class: "items" });
        this.earlier = button("", () => this.#earlier(), { class: "more", hidden: true });
        this.element = make("div", {}, this.earlier, this.list);
        this.update();
    }

    update() {
        const { items } = this.node;
        this.first ??= Math.max(0, items.length - ITEMS);
        if (items.length - this.next > ITEMS) this.#skip(items.length - ITEMS);
        for (; this.next < items.length; this.next++) this.list.append(this.#view(items[this.next]));
        if (this.next - this.first > 4 * ITEMS) this.#drop(this.next - 2 * ITEMS);
        this.#label();
    }

    #view(item) {
        if (item.kind === "note") return note(item.record);
        return this.timeline.view(item, () => new TurnView(this.timeline, item)).element;
    }

    #skip(to) {
        this.#drop(this.next);
        this.first = this.next = to;
    }

    #drop(to) {
        for (; this.first < to; this.first++) {
            this.timeline.forget(this.node.items[this.first]);
            this.list.firstChild?.remove();
        }
    }

    #earlier() {
        const to = Math.max(0, this.first - MORE);
        this.list.prepend(...this.node.items.slice(to, this.first).map((item) => this.#view(item)));
        this.first = to;
        this.#label();
    }

    #label() {
        this.earlier.hidden = !this.first;
        this.earlier.textContent = `Show earlier (${number(this.first)})`;
    }
}

class TurnView {
    constructor(timeline, turn) {
        this.timeline = timeline;
        this.turn = turn;
        const name = `${turn.node.name === "root" ? "Turn" : `${turn.node.name}, turn`} ${turn.number}`;
        this.facts = make("p", { class: "facts" });
        this.reply = make("div", { class: "reply" });
        this.cells = make("div", { class: "cells" });
        this.sent = make("div", {});
        this.element = make("article", { class: "turn", tabindex: -1, "aria-label": name },
            make("header", {}, make("h3", {}, name), this.facts), this.reply, this.cells, this.sent);
        this.shown = 0;
        this.told = 0;
        this.update();
    }

    update() {
        const { turn, timeline } = this;
        fill(this.facts, ...facts(turn.calls, turn.calls.length ? "thinking" : ""));
        const answers = replies(turn);
        if (answers.length !== this.told) {
            this.told = answers.length;
            fill(this.reply, this.#reply(answers));
            fill(this.sent, this.#sent());
        }
        for (; this.shown < turn.cells.length; this.shown++) {
            const cell = turn.cells[this.shown];
            this.cells.append(timeline.view(cell, () => new CellView(timeline, cell)).element);
        }
    }

    #reply(answers) {
        if (answers.some((answer) => !answer.texts.completion && !this.timeline.tree.keeps("completion")))
            return notKept("The reply");
        return answers.map((answer) => {
            const { text, length } = answer.texts.completion ?? { text: "", length: 0 };
            if (text.length < length) return payload(this.timeline, answer, "completion", { label: "reply" });
            const said = prose(text);
            return said && make("div", { class: "prose" }, long(said, { label: "reply" }));
        });
    }

    /* What the model was sent, which is mostly what this page shows already: brought when it is asked for. */
    #sent() {
        const { intent } = this.turn.calls[0].attempts[0];
        if (!intent.texts.prompt) return null;
        const box = make("details", { class: "sent" }, make("summary", {}, "Sent to the model"));
        box.addEventListener("toggle", async () => {
            if (box.childElementCount > 1) return;
            const told = (await recordOf(this.timeline.query, intent.seq)).payloads.prompt ?? "[]";
            const { messages, shared } = intent.body;
            box.append(make("p", { class: "facts" }, shared ? `${counted(shared, "message")} as before, and:` : counted(messages, "message")));
            for (const message of JSON.parse(told))
                box.append(make("h4", {}, String(message.role)), ...long(String(message.content), { label: "message" }));
        });
        return box;
    }
}

/* What is to be said of requests that are one call, or one turn: model, tokens, cost, time. */
function facts(calls, doing) {
    const attempts = calls.flatMap((call) => call.attempts);
    if (!attempts.length) return [];
    const first = attempts[0].intent, last = attempts.at(-1);
    const results = attempts.map((attempt) => attempt.result).filter(Boolean);
    const cost = results.reduce((sum, result) => sum + nano(result.body.cost_usd), 0n);
    const tokens = (name) => results.reduce((sum, result) => sum + (result.body.usage?.[name] ?? 0), 0);
    const parts = [make("span", {}, String(last.intent.body.model))];
    if (last.intent.body.last) parts.push(make("span", {}, "last word"));
    if (last.result) {
        parts.push(make("span", {}, `${number(tokens("input_tokens"))} → ${number(tokens("output_tokens"))} tokens`));
        parts.push(make("span", { class: "cost", title: `${results.map((one) => one.body.cost_usd).join(" + ")} USD` }, usd(cost)));
        parts.push(make("span", {}, duration((new Date(last.result.at) - new Date(first.at)) / 1000)));
        if (last.result.body.outcome !== "answered")
            parts.push(status(last.result.body.outcome), make("span", {}, line(last.result.body.detail)));
    } else if (doing) {
        parts.push(make("span", { class: "status", "data-status": "running" }, doing));
    }
    if (attempts.length > calls.length) parts.push(make("span", {}, counted(attempts.length, "attempt")));
    return parts;
}

class CellView {
    constructor(timeline, cell) {
        this.timeline = timeline;
        this.cell = cell;
        const { began } = cell;
        this.facts = make("p", { class: "facts" });
        this.asked = new AskedView(timeline, cell);
        this.output = make("div", { class: "output" });
        const code = began.type === "cell.started" && (payload(timeline, began, "code", { show: highlighted, absent: "The code" }) ?? notKept("The code"));
        this.element = make("section", { class: "cell" }, this.facts, make("div", { class: "code" }, code), this.asked.element, this.output);
        this.update();
    }

    show(node) {
        this.asked.show(node);
    }

    update() {
        const { began, ended } = this.cell;
        this.asked.update();
        if (this.done) return;
        const name = began.type === "cell.started" ? `Cell ${began.body.cell}` : "Without a cell";
        fill(this.facts, make("span", {}, name), ended ? status(ended.body.status) : began.type === "cell.started" && status("running"),
            ended && make("span", {}, duration(ended.body.duration_ms / 1000)));
        if (!ended) return;
        this.done = true;
        const { detail, dropped_bytes: dropped, names, answered } = ended.body;
        fill(this.output,
            payload(this.timeline, ended, "stdout", { label: "output" }),
            make("div", { class: "stderr" }, payload(this.timeline, ended, "stderr", { label: "errors" })),
            dropped > 0 && make("p", { class: "cut" }, `Cut here: ${bytes(dropped)} more came out than the limit of a cell's output lets through.`),
            detail && !ended.texts.stderr?.text.includes(detail) && make("p", { class: "detail" }, line(detail, 1000)),
            answered && make("p", { class: "detail" }, "This cell gave the answer."),
            names.length > 0 && make("p", { class: "names" }, "New names: ", names.slice(0, 12).map((one, i) => [i ? ", " : "", make("code", {}, line(one, 60))]),
                names.length > 12 && ` and ${number(names.length - 12)} more`));
    }
}

/* What a cell asked for: so many, for so much. Child queries have a list of their own: they are few, and worth more. */
class AskedView {
    constructor(timeline, cell) {
        this.timeline = timeline;
        this.cell = cell;
        this.head = make("p", { class: "facts" });
        this.lists = [new Listed(timeline), new Listed(timeline)];
        this.shown = 0;
        this.element = make("div", { class: "asked", hidden: true }, this.head, this.lists.map((list) => list.element));
        this.update();
    }

    update() {
        const { asked, sums } = this.cell;
        this.element.hidden = !asked.length;
        for (; this.shown < asked.length; this.shown++) this.#listOf(asked[this.shown]).parts.push(asked[this.shown]);
        for (const list of this.lists) list.update();
        const children = asked.length - sums.calls;
        fill(this.head,
            sums.calls > 0 && make("span", {}, counted(sums.calls, "sub-call")),
            children > 0 && make("span", {}, counted(children, "child query", "child queries")),
            sums.open > 0 && make("span", { class: "status", "data-status": "running" }, `${number(sums.open)} in flight`),
            sums.failed > 0 && make("span", { class: "failed" }, `${number(sums.failed)} not answered`),
            sums.calls > 0 && make("span", { class: "cost" }, usd(sums.spent)));
    }

    show(part) {
        this.update();
        this.#listOf(part).show(part);
    }

    #listOf(part) {
        return this.lists[part.kind === "node" ? 1 : 0];
    }
}

/* Sub-calls or child queries: the first of them, and more when it is asked for. */
class Listed {
    constructor(timeline) {
        this.timeline = timeline;
        this.parts = [];
        this.most = ASKED;
        this.shown = 0;
        this.list = make("div", { class: "calls", hidden: true });
        this.more = button("", () => this.#add(MORE), { class: "more", hidden: true });
        this.element = make("div", {}, this.list, this.more);
    }

    update() {
        for (; this.shown < Math.min(this.most, this.parts.length); this.shown++) this.list.append(this.#view(this.parts[this.shown]));
        const left = this.parts.length - this.shown;
        this.list.hidden = !this.shown;
        this.more.hidden = !left;
        this.more.textContent = `Show ${number(Math.min(MORE, left))} more (of ${number(left)})`;
    }

    show(part) {
        this.#add(Math.min(20 * MORE, this.parts.indexOf(part) + 1 - this.most));
    }

    #add(more) {
        this.most += Math.max(0, more);
        this.update();
    }

    #view(part) {
        const { timeline } = this;
        if (part.kind === "call") return timeline.view(part, () => new CallView(timeline, part)).element;
        if (part.kind === "node") return timeline.view(part, () => new ChildView(timeline, part)).element;
        const { body } = part.record;
        const what = part.kind === "refused" ? line(body.detail, 300) : `as ${body.of} was`;
        return make("p", { class: "call plain" }, make("span", { class: "name" }, "sub-call"), status(part.kind), make("span", { class: "gist" }, what));
    }
}

/* Opens to what it is about when it is opened, and not before. */
class Opening {
    constructor(timeline, part, kind) {
        this.timeline = timeline;
        this.part = part;
        this.summary = make("summary", {});
        this.body = make("div", { class: "body" });
        this.element = make("details", { class: kind }, this.summary, this.body);
        this.element.addEventListener("toggle", () => this.element.open && this.fillBody());
        this.update();
    }
}

class CallView extends Opening {
    constructor(timeline, call) {
        super(timeline, call, "call");
    }

    update() {
        const { attempts, name } = this.part;
        const { intent, result } = attempts.at(-1);
        const outcome = result?.body.outcome ?? "running";
        fill(this.summary, make("span", { class: "name" }, name.split(".").at(-1)), status(outcome),
            make("span", { class: "gist" }, line(attempts[0].intent.texts.prompt?.text ?? "prompt: not kept", 160)),
            make("span", { class: "cost" }, result ? usd(nano(result.body.cost_usd)) : ""));
        this.intent = intent;
        if (this.filled && this.filled !== attempts.length + Boolean(result)) this.fillBody(true);
    }

    fillBody(again = false) {
        if (this.filled && !again) return;
        const { attempts } = this.part, { result } = attempts.at(-1);
        this.filled = attempts.length + Boolean(result);
        fill(this.body, make("p", { class: "facts" }, facts([this.part], "")),
            make("h4", {}, "Prompt"), payload(this.timeline, this.intent, "prompt", { absent: "The prompt" }) ?? notKept("The prompt"),
            result && [make("h4", {}, "Completion"), result.body.outcome === "answered"
                ? (payload(this.timeline, result, "completion", { label: "completion", absent: "The completion" }) ?? make("p", { class: "absent" }, "An empty reply."))
                : make("p", { class: "detail" }, line(result.body.detail, 500))]);
    }
}

class ChildView extends Opening {
    constructor(timeline, node) {
        super(timeline, node, "call child");
    }

    update() {
        const { name, began, ended, spent } = this.part;
        fill(this.summary, make("span", { class: "name" }, name), status(statusOf(this.part)),
            make("span", { class: "gist" }, line(began.texts.question?.text ?? "question: not kept", 160)),
            make("span", { class: "cost" }, usd(ended ? nano(ended.body.cost_usd) : spent)));
        this.items?.update();
        if (this.items && ended && !this.closed) this.#close(ended);
    }

    fillBody() {
        if (this.items) return;
        const { began, ended } = this.part;
        this.items = new Items(this.timeline, this.part);
        fill(this.body,
            make("p", { class: "facts" }, make("span", {}, String(began.body.model)), make("span", {}, `at most ${usd(nano(began.body.limit_usd))}`)),
            make("h4", {}, "Question"), payload(this.timeline, began, "question") ?? notKept("The question"), this.items.element);
        if (ended) this.#close(ended);
    }

    #close(ended) {
        this.closed = true;
        const { status: how, reason } = ended.body;
        this.body.append(make("h4", {}, "Answer"));
        const answer = payload(this.timeline, ended, "answer") ?? make("p", { class: "absent" }, `None: ${how}.`);
        this.body.append(...[answer].flat());
        if (reason) this.body.append(make("p", { class: "detail" }, line(reason, 1000)));
    }
}

/* What happened to a node besides its turns, in a line. */
function note(record) {
    const { body, type, at } = record;
    const text = {
        "sandbox.started": () => `Sandbox started: ${body.backend} (${body.isolation}), Python ${body.python}, ${body.start}`,
        "sandbox.ended": () => `Sandbox ended${body.oom ? ": out of memory" : ""}${body.cpu_ms === null ? "" : `; CPU ${duration(body.cpu_ms / 1000)}`}` +
            (body.peak_memory_bytes === null ? "" : `, peak memory ${bytes(body.peak_memory_bytes)}`),
        "context.verified": () => (body.unchanged ? "The context is unchanged" : "THE CONTEXT HAS CHANGED"),
        "limit.hit": () => `Limit: ${body.detail}`,
        "query.interrupted": () => `Interrupted: ${body.why}`,
        "query.resumed": () => `Resumed in ${body.backend}: ${counted(body.cells, "cell")} and ${counted(body.calls, "answer")} are on record`,
        "cell.replayed": () => `Cell ${body.cell} was run again: ` + (body.same ? "as before" : `other ${body.differs.join(", ")} than before`),
    }[type];
    const loud = type === "limit.hit" || type === "query.interrupted" || (type === "context.verified" && !body.unchanged);
    return make("p", { class: loud ? "note loud" : "note" }, make("time", { datetime: at }, when(at)), text ? line(text(), 1000) : printable(type));
}
