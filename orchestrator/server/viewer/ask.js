/* The form for a new query. */

import { get, post } from "./api.js";
import { fill, make } from "./dom.js";
import { upload } from "./upload.js";

const INLINE = 1_000_000; // characters: a longer text is uploaded as a file is
const place = (id) => document.getElementById(id);
const dialog = place("ask");
let models = null;
let asked = { words: "", key: "" };

export async function openAsk() {
    dialog.showModal();
    place("question").focus();
    models ??= get("/v1/models").then(({ data }) =>
        place("model").append(...data.map(({ id }) => id.replace(/^rlm\//, "")).map((name) => make("option", { value: name }, name))));
    await models.catch(() => (models = null)); // the service's own can be asked all the same
}

function source() {
    return dialog.querySelector("input[name=source]:checked").value;
}

function refuse(text) {
    place("ask-fault").hidden = !text;
    fill(place("ask-fault"), text);
}

async function context() {
    const text = place("text").value;
    if (source() === "text" && text.length <= INLINE) return { text };
    const [file] = source() === "text" ? [new File([text], "pasted.txt")] : place("file").files;
    const bar = place("sent");
    bar.hidden = false;
    try {
        const made = await upload(file, source() === "text" ? { kind: "text", encoding: "utf-8" } : { kind: place("kind").value, encoding: place("encoding").value }, (part) => (bar.value = part));
        return { id: made.id };
    } finally {
        bar.hidden = true;
        bar.value = 0;
    }
}

function randomKey() {
    return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send() {
    const question = { question: place("question").value, context: await context() };
    if (place("model").value) question.model = place("model").value;
    if (place("budget").value) question.budget_usd = place("budget").value;
    // Sent again as it was, after an answer that was lost, it is the same query.
    const words = JSON.stringify(question);
    if (words !== asked.words) asked = { words, key: randomKey() };
    const { id } = await post("/v1/queries", question, { "Idempotency-Key": asked.key });
    location.assign(`/q/${id}`);
}

place("ask-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    refuse("");
    if (source() === "file" && !place("file").files.length) return refuse("Choose a file, or paste a text.");
    if (source() === "text" && !place("text").value) return refuse("Paste a text, or choose a file.");
    place("ask-send").disabled = true;
    try {
        await send();
    } catch (error) {
        refuse(error.message);
    } finally {
        place("ask-send").disabled = false;
    }
});

place("ask-close").addEventListener("click", () => dialog.close());
for (const one of dialog.querySelectorAll("input[name=source]"))
    one.addEventListener("change", () => {
        place("by-text").hidden = source() !== "text";
        place("by-file").hidden = source() !== "file";
    });
place("file").addEventListener("change", () => {
    const name = place("file").files[0]?.name.toLowerCase() ?? "";
    place("kind").value = name.endsWith(".json") ? "json" : /\.(jsonl|ndjson)$/.test(name) ? "jsonl" : "text";
});
