/* The page of one query: live while it runs, from the journal's own records. */

import { get, isQuery, may, post, request, whoAmI } from "./api.js";
import { replay, verify } from "./audit.js";
import { Bar, button, fill, long, make, moveByKeys, notKept, status } from "./dom.js";
import { Outline } from "./outline.js";
import { Tree, TYPES, statusOf } from "./records.js";
import { greet, reportFaults } from "./shell.js";
import { bytes, counted, duration, line, nano, printable, usd, when } from "./text.js";
import { Timeline } from "./timeline.js";

const AGAIN_MS = 5_000; // until a stream that was refused is asked for again
const SPEND_MS = 2_000; // between two looks at what is spent and held, while something changes
const ENDED = ["answered", "limit", "refused", "failed", "cancelled"];
const place = (id) => document.getElementById(id);

class Page {
    constructor(id) {
        this.id = id;
        this.view = null; // the query as the API gives it
        this.spend = null;
        this.skew = 0; // of this machine's clock, ms
        this.said = "";
        this.touched = new Set(); // nodes
        this.money = new Bar("Money");
        this.time = new Bar("Time");
        place("meters").append(this.money.element, this.time.element);
        this.tree = new Tree((part) => {
            if (part.kind === "node") this.touched.add(part);
            this.timeline.changed(part);
        });
        this.timeline = new Timeline(place("timeline"), id, this.tree, () => this.draw());
        this.outline = new Outline(place("outline"), this.tree, (node) => this.timeline.reveal(node));
    }

    get ended() {
        return Boolean(this.tree.closed) || ENDED.includes(this.view?.status);
    }

    get status() {
        if (this.tree.closed) return statusOf(this.tree.root);
        if (this.tree.last?.type === "query.interrupted") return "interrupted";
        const told = this.view?.status ?? "queued";
        // Its records are ahead of the answer that we have.
        return told === "queued" && this.tree.root?.items.length ? "running" : told;
    }

    async load() {
        const answer = await request(`/v1/queries/${this.id}`);
        const now = Date.parse(answer.headers.get("Date") ?? "");
        if (!Number.isNaN(now)) this.skew = Date.now() - now;
        const first = !this.view;
        this.view = await answer.json();
        if (first) this.head();
        this.draw();
    }

    /* What does not change. */
    head() {
        const { view } = this;
        fill(place("question"), view.question === null ? notKept("Question") : line(view.question, 300));
        if (view.question?.length > 300)
            place("question").parentElement.append(make("details", {}, make("summary", {}, "The whole question"), long(view.question, { label: "question" })));
        const { context } = view;
        const parts = [
            ["model", view.model ?? "none"], view.sub_models.some((name) => name !== view.model) && ["sub-calls", view.sub_models.join(", ")],
            ["sandbox", `${view.backend} (${view.isolation})`],
            ["context", [context.name, context.kind, bytes(context.bytes)].filter(Boolean).join(", ")], ["asked", when(view.created_at)],
        ].filter(Boolean);
        fill(place("facts"), parts.map(([name, text]) => make("span", {}, make("b", {}, name), " ", line(text, 200))));
    }

    draw() {
        const { tree, view } = this;
        this.outline.update(this.touched);
        this.touched.clear();
        const turns = tree.root?.turns.length ?? 0;
        const now = this.status;
        const doing = now === "running" && turns ? `turn ${turns}` : "";
        if (this.said !== now + doing) {
            this.said = now + doing;
            document.body.dataset.state = now;
            document.title = printable(`${now}: ${line(view?.question ?? this.id, 60)} - Airlock`);
            fill(place("status"), status(now), doing && ` ${doing}`);
            this.actions();
        }
        if (tree.closed && !this.answered) this.answer();
        if (view) this.meters();
    }

    meters() {
        const { tree, view } = this;
        const limit = nano(view.limit_usd);
        const spent = tree.closed ? nano(tree.closed.body.cost_usd) : max(tree.spent, nano(this.spend?.spent_usd ?? view.cost_usd));
        const held = this.ended ? 0n : nano(this.spend?.held_usd ?? view.held_usd);
        this.money.update(`${usd(spent)}${held ? ` + ${usd(held)} held` : ""} of ${usd(limit)}`, share(spent, limit), share(held, limit));
        const begun = tree.root?.began.at ?? view.created_at;
        const seconds = (tree.closed?.body.duration_ms ?? (view.duration_s ?? NaN) * 1000) / 1000;
        const gone = Number.isNaN(seconds) ? (this.status === "running" ? (Date.now() - this.skew - Date.parse(begun)) / 1000 : 0) : seconds;
        const most = view.time_limit_s;
        this.time.update(most === null ? duration(gone) : `${duration(gone)} of ${duration(most)}`, most === null ? 0 : gone / most);
    }

    answer() {
        this.answered = true;
        const { closed } = this.tree, { reason, turns, sub_calls: calls, refused } = closed.body;
        const text = this.view?.answer ?? closed.texts.answer?.text ?? null;
        const length = this.view?.answer?.length ?? closed.texts.answer?.length;
        const whole = async () => (await get(`/v1/queries/${this.id}`)).answer;
        const body = text !== null ? long(text, { first: 6_000, length, whole, label: "answer" })
            : this.tree.keeps("answer") ? make("p", { class: "absent" }, "There is no answer.") : notKept("The answer");
        place("answer").hidden = false;
        fill(place("answer"), make("h2", {}, "Answer"), body, reason && make("p", { class: "detail" }, line(reason, 1000)),
            make("p", { class: "facts" }, make("span", {}, counted(turns ?? 0, "turn")), make("span", {}, counted(calls ?? 0, "sub-call")),
                refused > 0 && make("span", {}, `${refused} refused`)));
    }

    actions() {
        const audits = may("audit"), over = this.ended || this.status === "interrupted";
        fill(place("actions"),
            !this.ended && may("query") && button("Cancel", () => this.cancel(), { class: "danger" }),
            over && audits && button("Replay", () => replay(place("replay"), this.id)),
            audits && make("a", { class: "button", href: `/v1/audit/queries/${this.id}/export`, download: `${this.id}.tar` }, "Export"));
        if (over && audits && this.checked !== this.status) {
            this.checked = this.status;
            verify(place("verdict"), this.id).catch((error) => {
                fill(place("verdict"), make("span", { class: "status", "data-status": "failed" }, "Journal not checked"), ` ${line(error.message, 300)}`);
            });
        }
    }

    async cancel() {
        this.view = await post(`/v1/queries/${this.id}/cancel`);
        this.draw();
    }

    /* The records, from the first one that is not here on, until the query has ended. Not while nobody looks: a browser
    has few connections to one service, and pages in other tabs need them. */
    listen() {
        if (document.hidden) return;
        const source = (this.source = new EventSource(`/v1/queries/${this.id}/events?after=${this.tree.last?.seq ?? -1}`));
        const take = (event) => this.tree.take(JSON.parse(event.data));
        for (const type of TYPES) source.addEventListener(type, take);
        source.addEventListener("query.closed", () => {
            source.close();
            this.live("");
            this.load();
        });
        source.addEventListener("open", () => this.live(""));
        source.addEventListener("error", async () => {
            this.live("The connection broke; trying again.");
            if (source.readyState !== EventSource.CLOSED) return; // the browser tries by itself
            await this.load().catch((error) => this.live(error.message));
            setTimeout(() => this.look(), AGAIN_MS);
        });
    }

    /* Whenever the page is looked at again. */
    look() {
        this.source?.close();
        if (!this.tree.closed) this.listen();
    }

    live(text) {
        place("fault").hidden = !text;
        fill(place("fault"), text);
    }

    /* What changes with time alone, and what is held. */
    async watch() {
        let seen = -1;
        const clock = setInterval(() => {
            if (this.view) this.meters();
            if (this.ended) clearInterval(clock);
        }, 500);
        const look = async () => {
            if (!this.tree.closed && !document.hidden && (this.tree.last?.seq ?? -1) !== seen) {
                seen = this.tree.last?.seq ?? -1;
                this.spend = await get(`/v1/queries/${this.id}/spend`).catch(() => this.spend);
            }
            if (!this.ended) setTimeout(look, SPEND_MS);
            else this.draw();
        };
        await look();
    }
}

function share(part, whole) {
    return whole > 0n ? Number((part * 10_000n) / whole) / 10_000 : 0;
}

function max(one, other) {
    return one > other ? one : other;
}

reportFaults();
const id = location.pathname.split("/").at(-1);
greet(await whoAmI());
if (isQuery(id)) {
    fill(place("id"), id);
    const page = new Page(id);
    await page.load();
    page.listen();
    document.addEventListener("visibilitychange", () => page.look());
    moveByKeys(() => [...document.querySelectorAll("#timeline .turn")].filter((turn) => turn.checkVisibility()));
    await page.watch();
}
