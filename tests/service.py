"""The service as its clients see it: the real one, in a process of its own, on a free port of this machine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from orchestrator.store.db import Database
from orchestrator.store.journal import key_created
from orchestrator.store.registry import Registry
from orchestrator.store.signing import Notary
from orchestrator.store.vault import open_vault
from tests.command import Airlock

SCRIPT = """
root:
  - |
    ```repl
    print(len(context))
    said = llm_query("Is this long? " + context[:20])
    ```
  - FINAL_VAR(said)
sub:
  - match: '.'
    reply: 'it is short'
"""
SLOW = SCRIPT + "delay_s: 30\n"


@dataclass
class Served:
    """A service that runs. log: the lines of its standard error so far, as a file."""

    airlock: Airlock
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    keys: dict[str, str] = field(default_factory=dict)

    def key(self, tenant: str = "acme", *scopes: str) -> str:
        """An API key of the tenant's, both made when they are not there."""
        name = " ".join((tenant, *scopes))
        if name not in self.keys:
            self.keys[name] = make_key(self.airlock, tenant, *scopes)
        return self.keys[name]

    def client(self, tenant: str = "acme", *scopes: str, **options: Any) -> httpx2.Client:
        """Close it, or use it as a context manager."""
        headers = {"Authorization": f"Bearer {self.key(tenant, *scopes)}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def served(
    airlock: Airlock, *options: object, script: str = SCRIPT, config: str = "", by_default: bool = True
) -> Iterator[Served]:
    """`airlock serve` with a scripted model. config: `airlock.toml`. by_default: it is asked where none is named."""
    model = f"scripted:{airlock.file('script.yaml', script)}"
    if not by_default:
        config += f'[models."{model}"]\n'
    if config:
        airlock.home.mkdir(mode=0o700, exist_ok=True)
        (airlock.home / "airlock.toml").write_text(config)
    log = airlock.folder / "serve.log"
    with log.open("wb") as err:
        asked = ("--model", model) if by_default else ()
        command = ("serve", "--port", 0, *asked, "--backend", "bubblewrap", *options)
        with airlock.started(*command, stderr=err, stdin=subprocess.DEVNULL) as running:
            yield Served(airlock, _address(running.process, log), running.process, log)
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGTERM)
                assert running.process.wait(60) == 0, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text(), log.read_text()[-5000:]


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    from tests.command import until

    def found() -> str | None:
        assert process.poll() is None, log.read_text()
        match = re.search(r"https?://[^\s\"]+", log.read_text())
        return match[0] if match else None

    return until(found, 30)


@contextmanager
def registry(airlock: Airlock) -> Iterator[Registry]:
    """Tenants and keys, beside the service, as the command line has them."""
    db = Database(airlock.home, airlock.env.get("AIRLOCK_DATABASE"))
    try:
        vault = open_vault(db, airlock.home, airlock.env.get("AIRLOCK_MASTER_KEY"), key_created)
        yield Registry(db, vault, Notary(vault.signer(), airlock.home / "heads", vault.stamp))
    finally:
        db.close()


def make_key(airlock: Airlock, tenant: str, *scopes: str) -> str:
    with registry(airlock) as known:
        if known.tenant(tenant) is None:
            known.add_tenant(tenant, by="a test")
        label = "-".join(scopes) or "default"
        more: dict[str, Any] = {"scopes": scopes} if scopes else {}
        return known.create_key(tenant, label=label, by="a test", **more)[1]


def ask(client: httpx2.Client, question: str = "Is it long?", wait: int = 30, **more: Any) -> dict[str, Any]:
    """Ask, and wait for the end."""
    body = {"question": question, "context": {"text": "hello world"}, **more}
    answer = client.post("/v1/queries", json=body, headers={"Prefer": f"wait={wait}"})
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


def events(client: httpx2.Client, query: str, after: int | None = None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(id, type, data) of a query's events, to the end of the stream."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/v1/queries/{query}/events", headers=headers) as stream:
        assert stream.status_code in (200, 204), stream.read()
        seen: dict[str, str] = {}
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                seen[name] = value
            elif "data" in seen:
                yield int(seen["id"]), seen["event"], json.loads(seen["data"])
                seen = {}
