/* Elements, of text alone: nothing here reads markup, and every text is shown with what a browser would obey escaped. */

import { UNSAFE, cut, escape, number, printable } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";
const LITTLE = 1_000; // characters that are not worth a button
const PAGE = 100_000; // characters that are added to the page at once
const MOST_MARKS = 2_000; // of them, escapes that are elements of their own

/* attributes: names that we wrote. children: elements, and texts of anybody. What is null or false is left out. */
export function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) set(element, name, value);
    element.append(...nodes(children));
    return element;
}

function set(element, name, value) {
    if (value === null || value === undefined || value === false) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : printable(String(value)));
}

/* In place of what is in `element`. */
export function fill(element, ...children) {
    element.replaceChildren(...nodes(children));
}

function nodes(children) {
    const made = children
        .flat(Infinity)
        .filter((child) => child !== null && child !== undefined && child !== false)
        .map((child) => (child instanceof Node ? child : document.createTextNode(printable(String(child)))));
    // A space between elements, so that they are words of their own to whoever hears or copies them.
    return made.flatMap((node, i) => (node instanceof Element && made[i - 1] instanceof Element ? [" ", node] : [node]));
}

/* A text of whatever origin, its escapes marked as ours. */
export function marked(text) {
    const parts = document.createDocumentFragment();
    if ((text.match(UNSAFE)?.length ?? 0) > MOST_MARKS) {
        parts.append(printable(text));
        return parts;
    }
    let done = 0;
    for (const found of text.matchAll(UNSAFE)) {
        if (found.index > done) parts.append(text.slice(done, found.index));
        parts.append(make("span", { class: "escape" }, escape(found[0])));
        done = found.index + 1;
    }
    if (done < text.length) parts.append(text.slice(done));
    return parts;
}

/* A button. act: may be asynchronous; the button is off meanwhile. */
export function button(label, act, attributes = {}) {
    const element = make("button", { type: "button", ...attributes }, label);
    element.addEventListener("click", async () => {
        element.disabled = true;
        try {
            await act();
        } finally {
            element.disabled = false;
        }
    });
    return element;
}

/* A text, at most `first` characters of it to begin with; what it is shown by is of `show`.

length: of the whole. whole: brings the whole, where `text` is only its beginning. */
export function long(text, { first = 4_000, show = marked, length = text.length, whole = null, label = "text" } = {}) {
    const box = make("pre", { class: "text", tabindex: 0, role: "group", "aria-label": label });
    let shown = 0;
    const add = (most) => {
        const next = cut(text.slice(shown), most);
        shown += next.length;
        box.append(show(next));
        const left = length - shown;
        more.textContent = `${left > PAGE ? "Show more" : "Show all"} (${number(left)} more characters)`;
        return left <= 0;
    };
    const more = button("", async () => {
        if (text.length < length && whole) text = await whole();
        length = text.length;
        if (!add(PAGE)) return;
        more.remove();
        box.focus();
    }, { class: "more" });
    return add(length > first + LITTLE ? first : length) ? [box] : [box, more];
}

/* What stands where a text would be that is not kept. */
export function notKept(what) {
    return make("p", { class: "absent" }, `${what}: not kept`);
}

/* How much of a limit is used, and held: shares from 0 to 1. */
export class Bar {
    constructor(label) {
        const svg = document.createElementNS(SVG, "svg");
        this.rows = ["held", "used"].map((name) => {
            const row = document.createElementNS(SVG, "rect");
            row.setAttribute("class", name);
            row.setAttribute("height", "6");
            svg.append(row);
            return row;
        });
        for (const [name, value] of [["viewBox", "0 0 1000 6"], ["preserveAspectRatio", "none"], ["class", "bar"], ["aria-hidden", "true"]])
            svg.setAttribute(name, value);
        this.text = make("span", { class: "amount" });
        this.element = make("div", { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 },
            make("span", { class: "label" }, label), this.text, svg);
    }

    update(text, used, held = 0) {
        fill(this.text, text);
        const [part, both] = [used, used + held].map((share) => Math.round(Math.min(1, Math.max(0, share || 0)) * 1000));
        this.rows[0].setAttribute("width", both);
        this.rows[1].setAttribute("width", part);
        set(this.element, "data-full", part >= 900);
        set(this.element, "aria-valuenow", Math.round(part / 10));
        set(this.element, "aria-valuetext", text);
    }
}

/* What became of it, in a word and a colour. */
export function status(name) {
    return make("span", { class: "status", "data-status": name }, name);
}

/* The keys that move between elements. each: gives the elements, in order. */
export function moveByKeys(each) {
    document.addEventListener("keydown", (event) => {
        const typing = event.target.closest("input, textarea, select, dialog, pre");
        if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
        const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        const all = [...each()];
        const now = all.findIndex((one) => one === document.activeElement || one.contains(document.activeElement));
        const next = all[now < 0 ? (step > 0 ? 0 : all.length - 1) : now + step];
        if (!next) return;
        event.preventDefault();
        next.focus();
        next.scrollIntoView({ block: "nearest" });
    });
}
