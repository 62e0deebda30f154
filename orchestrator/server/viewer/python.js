/* Python in colours: a tokenizer that looks at each character once, and takes anything for code. */

import { make, marked } from "./dom.js";

const MOST = 40_000; // characters: more is shown in one colour

const KEYWORDS = new Set(
    ("False None True and as assert async await break class continue def del elif else except finally for from global if " +
        "import in is lambda match nonlocal not or pass raise return try while with yield").split(" "),
);
const OURS = new Set(
    ("context llm_query llm_query_batched rlm_query rlm_query_batched FINAL FINAL_VAR SHOW_VARS answer budget").split(" "),
);

// One alternative for each kind; each takes at least one character, and none looks back.
const TOKEN = new RegExp(
    [
        "(?<comment>#[^\\n]*)",
        "(?<string>[rRbBuUfFtT]{0,2}(?:'''(?:\\\\[\\s\\S]|[^\\\\])*?(?:'''|\\\\?$)|\"\"\"(?:\\\\[\\s\\S]|[^\\\\])*?(?:\"\"\"|\\\\?$)" +
            "|'(?:\\\\[\\s\\S]|[^'\\\\\\n])*'?|\"(?:\\\\[\\s\\S]|[^\"\\\\\\n])*\"?))",
        "(?<number>(?:0[xXoObB][0-9a-fA-F_]+|(?:[0-9][0-9_]*\\.?[0-9_]*|\\.[0-9][0-9_]*)(?:[eE][+-]?[0-9_]+)?)[jJ]?)",
        "(?<decorator>@[\\p{L}_][\\p{L}\\p{N}_.]*)",
        "(?<name>[\\p{L}_][\\p{L}\\p{N}_]*)",
        "(?<rest>[^#'\"0-9@\\p{L}_.]+|[\\s\\S])",
    ].join("|"),
    "uy",
);

/* [kind, text] pairs that together are `code`. kind: null for what has no colour. */
export function* tokens(code) {
    TOKEN.lastIndex = 0;
    for (let found; (found = TOKEN.exec(code)); ) {
        const kind = Object.entries(found.groups).find(([, text]) => text !== undefined)[0];
        yield [kind === "name" ? nameKind(code, found[0], TOKEN.lastIndex) : kind === "rest" ? null : kind, found[0]];
    }
}

function nameKind(code, name, end) {
    if (KEYWORDS.has(name)) return "keyword";
    if (OURS.has(name)) return "ours";
    return code[end] === "(" ? "call" : null;
}

export function highlighted(code) {
    if (code.length > MOST) return marked(code);
    const parts = document.createDocumentFragment();
    let plain = "";
    for (const [kind, text] of tokens(code)) {
        if (!kind) {
            plain += text;
            continue;
        }
        if (plain) parts.append(marked(plain));
        plain = "";
        parts.append(make("span", { class: `py-${kind}` }, marked(text)));
    }
    if (plain) parts.append(marked(plain));
    return parts;
}
