/* What the journal can be asked about a query that ended: whether it is whole, and whether its cells bring the same again. */

import { get, post } from "./api.js";
import { fill, long, make, status } from "./dom.js";
import { counted, line } from "./text.js";

/* The verdicts, as a badge that opens to them. */
export async function verify(place, query) {
    fill(place, status("checking"));
    const { whole, verdicts } = await get(`/v1/audit/queries/${query}/verify`);
    const rows = verdicts.map(({ name, holds, detail }) =>
        make("li", {}, make("span", { class: "status", "data-status": holds ? "ok" : "failed" }, holds ? "holds" : "BROKEN"), ` ${name}: ${line(detail, 500)}`));
    const word = whole ? "Journal verified" : "Journal BROKEN";
    fill(place, make("details", {}, make("summary", { class: "status", "data-status": whole ? "ok" : "failed" }, word),
        make("ul", { class: "verdicts" }, rows)));
}

/* Its cells run again, and in what they differ. */
export async function replay(place, query) {
    place.hidden = false;
    const heading = make("h2", {}, "Replay");
    fill(place, heading, make("p", { class: "facts" }, status("running"), make("span", {}, "its cells are run again, their calls answered from the journal")));
    let done;
    try {
        done = await post(`/v1/audit/queries/${query}/replay`);
    } catch (error) {
        fill(place, heading, make("p", { class: "fault", role: "alert" }, error.message));
        return;
    }
    const of = (verdict) => done.cells.filter((cell) => cell.verdict === verdict).length;
    const rest = of("not compared");
    fill(place, heading,
        make("p", { class: "facts", role: "status" },
            make("span", { class: "status", "data-status": done.same ? "ok" : "failed" }, done.same ? "the same" : "different"),
            make("span", {}, `${counted(done.cells.length, "cell")} again: ${of("same")} the same, ${of("different")} different`),
            rest > 0 && make("span", {}, `${rest} not compared`)),
        (done.notes ?? []).map((text) => make("p", { class: "note" }, line(text, 500))),
        done.cells.filter((cell) => cell.verdict !== "same").slice(0, 50).map((cell) =>
            make("div", { class: "differs" }, make("p", {}, `${cell.node} cell ${cell.cell}: ${cell.verdict}: ${line(cell.why, 500)}`),
                cell.diff?.length > 0 && long(cell.diff.join("\n"), { label: "differences" }))));
}
