/* What belongs together in a query's records: nodes, their turns, cells, and what cells asked for. Pure.

The rules are those of `orchestrator/exports/tree.py`. Records come one by one; `changed` is told what each was of. Of long
payloads the beginning is kept, so that a query of any size has room: `recordOf` brings them again. */

import { cut, lastMessage, nano } from "./text.js";

const MOST_ASKED = 4; // calls of one turn: a reply that was cut at its limit is continued three times, not oftener
const KEPT = 8_000; // characters of a payload

export const TYPES = (
    "query.opened query.narrowed query.interrupted query.resumed query.closed node.opened node.closed sandbox.started " +
    "sandbox.ended cell.started cell.ended cell.replayed call.intent call.result call.refused call.repeated budget.told budget.held " +
    "limit.hit context.verified"
).split(" ");

/* The beginning of a payload. length: of the whole. */
function kept(text) {
    // Through JSON, for a slice would hold on to all that it was cut from.
    return { text: text.length > KEPT ? JSON.parse(JSON.stringify(cut(text, KEPT))) : text, length: text.length };
}

function shortened(record) {
    const texts = {};
    for (const [name, text] of Object.entries(record.payloads ?? {})) {
        if (typeof text !== "string") continue;
        if (name === "prompt" && record.body.role === "root") texts[name] = { text: "", length: text.length };
        else texts[name] = kept(name === "prompt" ? lastMessage(text) : text);
    }
    return { seq: record.seq, at: record.at, type: record.type, node: record.node, body: record.body ?? {}, texts };
}

export class Tree {
    nodes = new Map();
    calls = new Map();
    opened = null;
    closed = null;
    last = null;
    spent = 0n;
    subCalls = 0;
    keeps = () => true;
    #changed;

    constructor(changed = () => {}) {
        this.#changed = changed;
    }

    get root() {
        return this.nodes.get("root") ?? null;
    }

    take(told) {
        if (this.last && told.seq <= this.last.seq) return; // told twice, around a reconnection
        const record = shortened(told);
        this.last = record;
        const node = this.#node(record);
        switch (record.type) {
            case "query.opened":
                this.#open(record);
                break;
            case "query.closed":
                this.closed = record;
                node.ended = record;
                break;
            case "node.closed":
                node.ended = record;
                if (node.within) this.#changed(node.within);
                break;
            case "call.intent":
                this.#intent(node, record);
                break;
            case "call.result":
                this.#result(node, record);
                break;
            case "call.refused":
            case "call.repeated":
                this.#ask(node, record, { kind: record.type === "call.refused" ? "refused" : "repeated", record });
                break;
            case "cell.started":
                this.#cell(node, record);
                break;
            case "cell.ended":
                if (node.running) {
                    node.running.ended = record;
                    this.#changed(node.running);
                    node.running = null;
                }
                break;
            case "budget.told":
            case "budget.held":
            case "node.opened":
                break;
            default:
                this.#note(node, record);
        }
        this.#changed(node);
    }

    #open(record) {
        this.opened = record;
        const policy = record.body.payloads;
        this.keeps = (name) => (Array.isArray(policy) ? policy.includes(name) : policy !== "hash");
    }

    #node(record) {
        let node = this.nodes.get(record.node);
        if (node) return node;
        const parent = this.nodes.get(record.node.split(".").slice(0, -1).join("."));
        node = {
            kind: "node", name: record.node, began: record, within: null, ended: null, items: [], turns: [], running: null,
            spent: 0n, parent: parent ?? null, children: [],
        };
        this.nodes.set(record.node, node);
        if (parent) {
            parent.children.push(node);
            node.within = this.#running(parent, record);
            node.within.asked.push(node);
            this.#changed(node.within);
        }
        return node;
    }

    #note(node, record) {
        node.items.push({ kind: "note", record });
        if (record.type === "limit.hit" && node.turns.length) node.turns.at(-1).over = true; // what comes is its last word
    }

    #turn(node, record) {
        const turn = { kind: "turn", node, number: node.turns.length + 1, began: record, calls: [], cells: [], over: false };
        node.turns.push(turn);
        node.items.push(turn);
        return turn;
    }

    #cell(node, record) {
        const turn = node.turns.at(-1) ?? this.#turn(node, record);
        const cell = { kind: "cell", turn, began: record, ended: null, asked: [], sums: { calls: 0, open: 0, failed: 0, spent: 0n } };
        turn.cells.push(cell);
        if (record.type === "cell.started") node.running = cell;
        this.#changed(turn);
        return cell;
    }

    /* The node's cell that runs, or ran last. What asks without a cell has one made up for it. */
    #running(node, record) {
        return node.running ?? node.turns.at(-1)?.cells.at(-1) ?? this.#cell(node, record);
    }

    #ask(node, record, asked) {
        const cell = this.#running(node, record);
        cell.asked.push(asked);
        cell.sums.calls += 1;
        if (asked.kind === "refused") cell.sums.failed += 1;
        asked.cell = cell;
        this.#changed(cell);
    }

    #intent(node, record) {
        const attempt = { intent: record, result: null };
        let call = this.calls.get(record.body.call);
        if (call) {
            call.attempts.push(attempt);
            if (call.cell) call.cell.sums.open += 1;
        } else {
            call = { kind: "call", name: String(record.body.call), node, attempts: [attempt], cell: null, turn: null };
            this.calls.set(record.body.call, call);
            if (record.body.role !== "root") {
                this.subCalls += 1;
                this.#ask(node, record, call);
                call.cell.sums.open += 1;
                return;
            }
            const last = node.turns.at(-1);
            call.turn = last && takes(last) ? last : this.#turn(node, record);
            call.turn.calls.push(call);
        }
        this.#changed(call);
        if (call.turn) this.#changed(call.turn);
    }

    #result(node, record) {
        const call = this.calls.get(record.body.call);
        if (!call) return;
        const cost = nano(record.body.cost_usd);
        call.attempts.at(-1).result = record;
        this.spent += cost;
        node.spent += cost;
        if (call.cell) {
            call.cell.sums.spent += cost;
            call.cell.sums.open -= 1;
            if (record.body.outcome !== "answered") call.cell.sums.failed += 1;
            this.#changed(call.cell);
        }
        this.#changed(call);
        if (call.turn) this.#changed(call.turn);
    }
}

/* The results of a turn's calls that brought a reply. */
export function replies(turn) {
    return turn.calls.map((call) => call.attempts.at(-1).result).filter((result) => result?.body.outcome === "answered");
}

/* Whether a call of the node's own LM that begins now is of this turn: the reply is not there, or was cut. */
function takes(turn) {
    if (turn.over || turn.cells.length) return false;
    const answers = replies(turn);
    if (!answers.length || turn.calls.at(-1).attempts.at(-1).result !== answers.at(-1)) return true;
    const { finish, detail } = answers.at(-1).body;
    return (finish || detail) === "length" && answers.length < MOST_ASKED;
}

export function statusOf(node) {
    return node.ended?.body.status ?? "running";
}
