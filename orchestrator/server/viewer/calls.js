/* What a cell asked for: sub-calls and child queries. Each opens to what it is about. */

import { button, fill, make, notKept, status } from "./dom.js";
import { facts, payload } from "./parts.js";
import { statusOf } from "./records.js";
import { counted, line, nano, number, usd } from "./text.js";

const ASKED = 8; // sub-calls of a cell, and child queries: the first of each
const MORE = 50; // and with each press of the button

/* What a cell asked for: so many, for so much. Child queries have a list of their own: they are few, and worth more. */
export class AskedView {
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
        this.items = this.timeline.itemsOf(this.part);
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
