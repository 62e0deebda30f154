/* The tree of a query's nodes, each with what it costs: a way around in the timeline. */

import { button, fill, make, status } from "./dom.js";
import { statusOf } from "./records.js";
import { counted, nano, number, usd } from "./text.js";

const NODES = 60; // on the page to begin with, and with each press of the button

export class Outline {
    #rows = new Map();
    #order = [];
    #most = NODES;

    constructor(place, tree, go) {
        this.tree = tree;
        this.go = go;
        this.list = make("ol", { class: "nodes" });
        this.more = button("", () => this.#more(), { class: "more", hidden: true });
        place.append(this.list, this.more);
    }

    /* Of the nodes that something came of since. */
    update(nodes) {
        for (const node of nodes) {
            if (!this.#rows.has(node)) this.#add(node);
            this.#rows.get(node)?.update();
        }
        const left = this.tree.nodes.size - this.#rows.size;
        this.more.hidden = !left;
        this.more.textContent = `Show more (${number(left)})`;
    }

    #add(node) {
        if (this.#rows.size >= this.#most) return;
        if (node.parent && !this.#rows.has(node.parent)) return;
        const row = new Row(node, this.go);
        // After its parent and all that is below that one: children come in order, nodes do not.
        const after = this.#order.findLastIndex((one) => one === node.parent || within(one, node.parent));
        this.#order.splice(after + 1, 0, node);
        this.#rows.set(node, row);
        this.list.insertBefore(row.element, this.list.children[after + 1] ?? null);
    }

    #more() {
        this.#most += NODES;
        this.update([...this.tree.nodes.values()]);
    }
}

function within(node, above) {
    for (let one = node.parent; one; one = one.parent) if (one === above) return true;
    return false;
}

class Row {
    constructor(node, go) {
        this.node = node;
        const depth = Math.min(8, node.name.split(".").length - 1);
        this.button = button("", () => go(node), { class: "node", "data-depth": depth });
        this.element = make("li", {}, this.button);
    }

    update() {
        const { node } = this;
        const calls = node.turns.flatMap((turn) => turn.cells).reduce((sum, cell) => sum + cell.sums.calls, 0);
        const spent = node.ended ? nano(node.ended.body.cost_usd) : node.spent;
        fill(this.button,
            make("span", { class: "name" }, node.name), status(statusOf(node)),
            make("span", { class: "facts" }, make("span", {}, counted(node.turns.length, "turn")), calls > 0 && make("span", {}, counted(calls, "sub-call")),
                make("span", { class: "cost" }, usd(spent))));
    }
}
