/* A query as it went, turn by turn. Drawn once a frame, and never more of it at once than a page can hold. */

import { button, fill, make } from "./dom.js";
import { note } from "./parts.js";
import { number } from "./text.js";
import { TurnView } from "./turns.js";

const ITEMS = 40; // turns and notes of a node that are on the page to begin with, the newest
const MORE = 50; // and with each press of the button

export class Timeline {
    #views = new Map();
    #dirty = new Set();
    #due = false;

    /* query: the id. tree: of its records. drawn: called after each frame. */
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

    /* The view of a part that is on the page; made by `build` where there is none. */
    view(part, build) {
        let view = this.#views.get(part);
        if (!view) this.#views.set(part, (view = build()));
        return view;
    }

    /* The turns and notes of a node: `element`, and `update` for what is new. */
    itemsOf(node) {
        return new Items(this, node);
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
            this.items = this.itemsOf(root);
            fill(this.place, this.items.element);
        }
        for (const part of parts) {
            if (part === root) this.items.update();
            else this.#views.get(part)?.update();
        }
        this.drawn();
    }
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
