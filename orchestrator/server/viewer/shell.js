/* What every page has around it. */

import { Refused, logOut } from "./api.js";
import { button, fill, make } from "./dom.js";

/* Who has logged in, and the way out. */
export function greet({ tenant }) {
    fill(document.getElementById("who"), make("span", { class: "tenant", title: "tenant" }, tenant), button("Log out", logOut, { class: "quiet" }));
}

/* What nobody else has caught is told, in a line. */
export function reportFaults() {
    const place = document.getElementById("fault");
    const tell = (event, error) => {
        event.preventDefault();
        place.hidden = false;
        fill(place, error instanceof Refused ? error.message : "Something went wrong on this page; load it again.");
    };
    addEventListener("unhandledrejection", (event) => tell(event, event.reason));
    addEventListener("error", (event) => tell(event, event.error));
}
