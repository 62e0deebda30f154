/* A turn: what the model said, the cells that it wrote, and what came of them. */

import { recordOf } from "./api.js";
import { AskedView } from "./calls.js";
import { fill, long, make, notKept, status } from "./dom.js";
import { facts, payload } from "./parts.js";
import { highlighted } from "./python.js";
import { replies } from "./records.js";
import { bytes, counted, duration, line, number, prose } from "./text.js";

export class TurnView {
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
