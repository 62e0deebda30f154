/* A file as a context, in pieces (tus 1.0): what breaks goes on where it was. */

import { Refused, get, request } from "./api.js";

const PIECE = 8 * 1024 * 1024;
const TRIES = 5; // of one piece
const VERSION = { "Tus-Resumable": "1.0.0" };

/* The context that the file has become, as the API tells it. told: how much is sent, from 0 to 1. Raises Refused. */
export async function upload(file, { kind, encoding }, told) {
    const about = Object.entries({ kind, encoding, name: named(file) });
    const begun = await request("/v1/contexts", {
        method: "POST",
        headers: { ...VERSION, "Upload-Length": file.size, "Upload-Metadata": about.map(([name, text]) => `${name} ${base64(text)}`).join(",") },
    });
    const place = new URL(begun.headers.get("Location"), location.href);
    if (place.origin !== location.origin) throw new Refused(0, "the service sent the upload elsewhere");
    let offset = 0;
    for (let tries = 0; offset < file.size; ) {
        try {
            offset = await send(place.pathname, file, offset);
            tries = 0;
        } catch (error) {
            if (!(error instanceof Refused) || (error.status >= 400 && error.status < 500 && error.status !== 409) || ++tries >= TRIES) throw error;
            offset = offsetOf(await request(place.pathname, { method: "HEAD", headers: VERSION }));
        }
        told(file.size ? offset / file.size : 1);
    }
    const { context } = await get(place.pathname);
    if (!context) throw new Refused(0, "the upload is not complete; try again");
    return context;
}

async function send(path, file, offset) {
    const headers = { ...VERSION, "Upload-Offset": offset, "Content-Type": "application/offset+octet-stream" };
    return offsetOf(await request(path, { method: "PATCH", headers, body: file.slice(offset, offset + PIECE) }));
}

function offsetOf(answer) {
    return Number(answer.headers.get("Upload-Offset"));
}

/* The file's name as the service takes it: what cannot be seen is replaced. */
function named(file) {
    return [...file.name.replace(/[^\p{L}\p{M}\p{N}\p{P}\p{S} ]/gu, "_")].slice(0, 255).join("");
}

function base64(text) {
    return btoa(String.fromCharCode(...new TextEncoder().encode(text)));
}
