/* Log in by a key, and go on to where one came from. */

import { fault, isQuery } from "./api.js";
import { fill } from "./dom.js";

const form = document.getElementById("login");
const key = document.getElementById("key");
const place = document.getElementById("fault");

function refuse(text) {
    place.hidden = false;
    fill(place, text);
    key.setAttribute("aria-invalid", "true");
    key.select();
    key.focus();
}

/* A page of ours, whatever the address says. */
function next() {
    const wanted = new URLSearchParams(location.search).get("next") ?? "";
    return wanted.startsWith("/q/") && isQuery(wanted.slice(3)) ? wanted : "/";
}

form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const submit = form.querySelector("button");
    submit.disabled = true;
    try {
        const answer = await fetch("/login", {
            method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ key: key.value.trim() }),
        });
        if (answer.ok) {
            key.value = "";
            location.replace(next());
        } else {
            refuse(answer.status === 401 ? "This key is not good. It may be mistyped, expired or revoked." : await fault(answer));
        }
    } catch {
        refuse("The service cannot be reached; try again.");
    } finally {
        submit.disabled = false;
    }
});

const told = new URLSearchParams(location.search);
if (told.has("refused")) refuse("This key is not good. It may be mistyped, expired or revoked.");
if (told.has("later")) refuse("Too many logins have failed; try again in a minute.");
