"""An OpenAI-compatible chat server that answers at once, by script, so that only the platform's own cost is seen.

    python -m tests.benchmarks.fake_lm        prints its port, serves until its standard input closes

A request with a system message is a root call; its turn is the number of assistant messages in it. Any other is a
sub-call. `GET /requests` returns the bodies received since the last `GET /requests`, as a list of JSON texts.
"""

from __future__ import annotations

import asyncio
import json
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


def completion(body: bytes) -> bytes:
    request = json.loads(body)
    text = reply_to(request["messages"])
    used, made = len(body) // 4 + 1, len(text) // 4 + 1
    usage = {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
    return json.dumps(whole | {"usage": usage}).encode()


class Server(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as far as the SDKs need it."""

    received: list[str] = []  # noqa: RUF012  of the whole server, as meant

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
            out = completion(body)
        else:
            out = json.dumps(Server.received).encode()
            Server.received.clear()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(out)}\r\n\r\n"
        self._transport.write(head.encode() + out)  # pyright: ignore[reportAttributeAccessIssue]


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def fake_lm() -> Iterator[str]:
    """The server in a process of its own; yields its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.fake_lm"],
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
    asyncio.run(serve())
