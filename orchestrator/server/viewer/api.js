/* The service's API, as the page of somebody who has logged in uses it. */

const QUERY = /^[0-9]{8}-[0-9]{6}-[0-9a-f]{10}$/;
const SAFE = ["GET", "HEAD"];
let session = null;
let leaving = false; // for the page to log in: once is enough

/* What went wrong, in a line for people. */
export class Refused extends Error {
    constructor(status, detail) {
        super(detail);
        this.status = status;
    }
}

export function isQuery(id) {
    return typeof id === "string" && QUERY.test(id);
}

/* Who has logged in: {tenant, scopes, csrf}. Whoever has not goes to log in, and this never comes back. */
export async function whoAmI() {
    session ??= await request("/v1/session").then((answer) => answer.json());
    return session;
}

export function may(scope) {
    return session?.scopes.includes(scope) ?? false;
}

/* One request; the response if it went well. Raises Refused. */
export async function request(path, { method = "GET", json, body, headers = {}, signal } = {}) {
    const sent = new Headers(headers);
    if (json !== undefined) sent.set("Content-Type", "application/json");
    if (!SAFE.includes(method)) sent.set("X-CSRF-Token", (await whoAmI()).csrf);
    let answer;
    try {
        answer = await fetch(path, {
            method, headers: sent, signal, body: json === undefined ? body : JSON.stringify(json), redirect: "error",
        });
    } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Refused(0, "the service cannot be reached; try again");
    }
    if (answer.status === 401) return logIn();
    if (!answer.ok) throw new Refused(answer.status, await fault(answer));
    return answer;
}

export async function get(path) {
    return (await request(path)).json();
}

export async function post(path, json, headers) {
    const answer = await request(path, { method: "POST", json, headers });
    return answer.status === 204 ? null : answer.json();
}

/* The detail of a problem (RFC 9457), with what is wrong where. */
export async function fault(answer) {
    try {
        const problem = await answer.json();
        const places = (problem.errors ?? []).map((one) => `${one.at}: ${one.is}`);
        return [problem.detail, ...places].filter((part) => typeof part === "string").join("; ");
    } catch {
        return `the service answered ${answer.status}`;
    }
}

function logIn() {
    if (!leaving) location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
    leaving = true;
    return new Promise(() => {});
}

export async function logOut() {
    leaving = true; // what else is asked for meanwhile may find that nobody is logged in
    try {
        await request("/logout", { method: "POST" });
        location.assign("/login");
    } catch (error) {
        leaving = false;
        throw error;
    }
}

/* One record of a query again, with all of its payloads. */
export async function recordOf(query, seq) {
    const stop = new AbortController();
    const answer = await request(`/v1/queries/${query}/events?after=${seq - 1}`, { signal: stop.signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    const lines = [];
    let open = "";
    try {
        for (;;) {
            const { done, value } = await reader.read();
            if (done) throw new Refused(0, "this record is not to be had");
            const parts = (open + value).split(/\r\n|\n|\r/);
            open = parts.pop();
            for (const part of parts) {
                if (part.startsWith("data:")) lines.push(part.slice(5));
                else if (part === "" && lines.length) return JSON.parse(lines.join("\n"));
            }
        }
    } finally {
        stop.abort();
    }
}
