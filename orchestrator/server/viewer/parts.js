/* What turns and calls have in common: payloads, the facts of a request, notes. */

import { recordOf } from "./api.js";
import { long, make, notKept, status } from "./dom.js";
import { bytes, counted, duration, lastMessage, line, nano, number, usd, when } from "./text.js";

/* A payload of a record, whatever its length. */
export function payload(timeline, record, name, options = {}) {
    const found = record.texts[name];
    if (!found) return timeline.tree.keeps(name) ? null : notKept(options.absent ?? options.label ?? name);
    const whole = async () => {
        const text = (await recordOf(timeline.query, record.seq)).payloads[name] ?? "";
        return name === "prompt" ? lastMessage(text) : text;
    };
    return long(found.text, { length: found.length, whole, label: name, ...options });
}

/* What is to be said of requests that are one call, or one turn: model, tokens, cost, time. */
export function facts(calls, doing) {
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

/* What happened to a node besides its turns, in a line. */
export function note(record) {
    const { body, type, at } = record;
    const text = {
        "sandbox.started": () => `Sandbox started: ${body.backend} (${body.isolation}), Python ${body.python}, ${body.start}`,
        "sandbox.ended": () => `Sandbox ended${body.oom ? ": out of memory" : ""}${body.cpu_ms === null ? "" : `; CPU ${duration(body.cpu_ms / 1000)}`}` +
            (body.peak_memory_bytes === null ? "" : `, peak memory ${bytes(body.peak_memory_bytes)}`),
        "context.verified": () => (body.unchanged ? "The context is unchanged" : "THE CONTEXT HAS CHANGED"),
        "limit.hit": () => `Limit: ${body.detail}`,
        "query.narrowed": () => `The policy was changed while it waited: ${body.limit_usd} USD at most`,
        "query.interrupted": () => `Interrupted: ${body.why}`,
        "query.resumed": () => `Resumed in ${body.backend}: ${counted(body.cells, "cell")} and ${counted(body.calls, "answer")} are on record`,
        "cell.replayed": () => `Cell ${body.cell} was run again: ` + (body.same ? "as before" : `other ${body.differs.join(", ")} than before`),
    }[type];
    const loud = type === "limit.hit" || type === "query.interrupted" || (type === "context.verified" && !body.unchanged);
    return make("p", { class: loud ? "note loud" : "note" }, make("time", { datetime: at }, when(at)), text ? line(text(), 1000) : type);
}
