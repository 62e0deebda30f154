/* What every page has around it. */

import { Refused, logOut } from "./api.js";
import { button, fill, make } from "./dom.js";

/* Who has logged in, and the way out. */
export function greet({ tenant }) {
    forgetWhenLeft();
    fill(document.getElementById("who"), make("span", { class: "tenant", title: "tenant" }, tenant), button("Log out", logOut, { class: "quiet" }));
}

/* A browser may keep a page as it was, for the way back: by then somebody else may sit there. It comes back empty, and
asks anew. */
function forgetWhenLeft() {
    addEventListener("pagehide", () => (document.documentElement.hidden = true));
    addEventListener("pageshow", (event) => event.persisted && location.reload());
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
