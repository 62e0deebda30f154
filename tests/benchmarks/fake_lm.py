"""An OpenAI-compatible chat server that answers at once, by script, so that only the platform's own cost is seen.

    python -m tests.benchmarks.fake_lm [SECONDS]   prints its port, serves until its standard input closes

SECONDS go by before each answer, 0 unless told otherwise.

A request with a system message is a root call; its turn is the number of assistant messages in it. Any other is a
sub-call. Who asks for a stream gets one: an event a word, each in an HTTP chunk of its own, as servers send them.
`GET /requests` returns the bodies received since the last `GET /requests`, as a list of JSON texts.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDLE = "the magic number is 42"
BATCH, SINGLE = 64, 8
TURNS = (
    "print(type(context), len(context))",
    "for start in range(3):\n    print(start, context[start * 100 : start * 100 + 20])",
    "hits = [line for line in context.splitlines() if 'magic' in line]\nprint(hits[:3])",
    f"found = llm_query_batched(['Part %d: is it there?' % n for n in range({BATCH})])\nprint(len(found), found[0])",
    f"more = [llm_query('Line %d: is it there?' % n) for n in range({SINGLE})]\nprint(len(more))",
    "answer['content'] = str(hits[0])\nanswer['ready'] = True",
)
REQUESTS = len(TURNS) + BATCH + SINGLE


def reply_to(messages: list[dict[str, str]]) -> str:
    roles = [message["role"] for message in messages]
    if "system" not in roles:
        return "no"
    return f"```repl\n{TURNS[min(roles.count('assistant'), len(TURNS) - 1)]}\n```"


def answer(body: bytes) -> bytes:
    """Head and body of the reply to a request."""
    request = json.loads(body)
    text = reply_to(request["messages"])
    used, made = len(body) // 4 + 1, len(text) // 4 + 1
    usage = {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made}
    frame = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
    if not request.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return whole(json.dumps(frame | {"choices": [choice], "usage": usage}).encode())
    frame["object"] = "chat.completion.chunk"
    words = re.findall(r"\s*\S+\s*$|\s*\S+", text)
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}, *({"content": word} for word in words), {}]
    events: list[dict[str, object]] = [
        frame | {"choices": [{"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}]}
        for delta in deltas
    ]
    events.append(frame | {"choices": [], "usage": usage})
    lines = [*(b"data: %s\n\n" % json.dumps(event).encode() for event in events), b"data: [DONE]\n\n"]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + chunks + b"0\r\n\r\n"


def whole(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Server(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as far as the SDKs need it."""

    received: list[str] = []  # noqa: RUF012  of the whole server, as meant
    delay_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            first, *fields = self._buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
            whole = end + 4 + int(headers.get("content-length", 0))
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            self._answer(first.startswith("POST"), body)

    def _answer(self, post: bool, body: bytes) -> None:
        if post:
            Server.received.append(body.decode())
            out = answer(body)
            if self.delay_s:
                asyncio.get_running_loop().call_later(self.delay_s, self._transport.write, out)  # pyright: ignore
                return
        else:
            out = whole(json.dumps(Server.received).encode())
            Server.received.clear()
        self._transport.write(out)  # pyright: ignore[reportAttributeAccessIssue]


async def serve(delay_s: float) -> None:
    Server.delay_s = delay_s
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def fake_lm(delay_s: float = 0.0) -> Iterator[str]:
    """The server in a process of its own; yields its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.fake_lm", str(delay_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdin
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]) if sys.argv[1:] else 0.0))
