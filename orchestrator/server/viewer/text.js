/* Texts as people read them. Pure. */

// What would reorder or hide text, as `orchestrator/console.py` has it. A test holds the two to each other.
export const UNSAFE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

/* `character` as Python writes it. */
export function escape(character) {
    if (character === "\r") return "\\r";
    const code = character.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
}

/* `text` with what a browser would obey made visible. */
export function printable(text) {
    return text.replace(UNSAFE, escape);
}

/* The first `most` characters, no pair of surrogates broken. */
export function cut(text, most) {
    if (text.length <= most) return text;
    return text.slice(0, /[\ud800-\udbff]/.test(text[most - 1]) ? most - 1 : most);
}

/* In one line, of at most `most` characters. */
export function line(text, most = 200) {
    const start = text.slice(0, most * 2).replace(/\s+/g, " ").trim();
    return start.length > most || text.length > most * 2 ? `${cut(start, most)}…` : start;
}

const NUMBER = new Intl.NumberFormat("en-US");

export function number(value) {
    return NUMBER.format(value);
}

/* `1 line`, `2 lines`. */
export function counted(value, noun, nouns = `${noun}s`) {
    return `${number(value)} ${value === 1 ? noun : nouns}`;
}

/* USD as exact text, as nano-USD. What is no amount counts as nothing. */
export function nano(text) {
    const found = /^(\d{1,16})(?:\.(\d{1,9}))?$/.exec(text ?? "");
    return found ? BigInt(found[1]) * 1_000_000_000n + BigInt((found[2] ?? "").padEnd(9, "0")) : 0n;
}

/* nano-USD as text: cents, and of less than a dollar two digits that say something. */
export function usd(amount) {
    const first = amount < 1_000_000_000n ? String(amount).padStart(9, "0").search(/[1-9]/) : 0;
    const places = Math.min(9, Math.max(2, first + 2));
    const step = 10n ** BigInt(9 - places);
    const rounded = ((amount + step / 2n) / step) * step;
    const rest = String(rounded % 1_000_000_000n).padStart(9, "0").replace(/0{1,7}$/, "");
    return `$${NUMBER.format(rounded / 1_000_000_000n)}.${rest.padEnd(2, "0")}`;
}

export function bytes(value) {
    for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
        if (value >= size) return `${(value / size).toFixed(value < 10 * size ? 1 : 0)} ${unit}`;
    return counted(value, "byte");
}

export function duration(seconds) {
    if (seconds < 1) return `${Math.max(0, Math.round(seconds * 1000))} ms`;
    if (seconds < 10) return `${seconds.toFixed(1)} s`;
    if (seconds < 60) return `${Math.floor(seconds)} s`;
    const [minutes, hours] = [Math.floor(seconds / 60), Math.floor(seconds / 3600)];
    const parts = hours ? [hours, "h", minutes % 60, "min"] : [minutes, "min", Math.floor(seconds % 60), "s"];
    return (parts[2] ? parts : parts.slice(0, 2)).join(" ");
}

const TIME = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });

/* The time of day of today; of other days the day as well. at: RFC 3339. */
export function when(at, now = new Date()) {
    const then = new Date(at);
    if (Number.isNaN(then.getTime())) return "";
    return then.toDateString() === now.toDateString() ? TIME.format(then) : `${DAY.format(then)}, ${TIME.format(then)}`;
}

/* What a reply says besides its cells, which are shown with what came of them. See `loop/parse.py`. */
export function prose(reply) {
    const kept = [];
    let fence = "", cell = false;
    for (const row of reply.split(/\r\n?|\n/)) {
        const found = /^[ \t]*(`{3,}|~{3,})[ \t]*(\w*)[^\n]*$/.exec(row);
        if (!fence && found) {
            fence = found[1];
            cell = ["repl", "python", "py"].includes(found[2].toLowerCase());
            if (!cell) kept.push(row);
        } else if (fence && found && found[1].startsWith(fence) && !found[2]) {
            if (!cell) kept.push(row);
            fence = "";
            cell = false;
        } else if (!cell) {
            kept.push(row);
        }
    }
    return kept.join("\n").replace(/\n{3,}/g, "\n\n").trim();
}

/* The content of the last message of a prompt; the prompt as it is where it has none. */
export function lastMessage(prompt) {
    try {
        const content = JSON.parse(prompt).at(-1).content;
        return typeof content === "string" ? content : prompt;
    } catch {
        return prompt;
    }
}
