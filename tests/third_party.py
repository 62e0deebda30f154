"""A third party that checks an export with FORMAT.md alone: nothing of Airlock is imported here.

Trees are another implementation's (pymerkle), signatures are the library's. What is wrong is an AssertionError.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pymerkle import InmemoryTree


def check_export(tar: Path) -> int:
    """How many records it has."""
    with tarfile.open(tar) as opened:
        files = {member.name: opened.extractfile(member).read() for member in opened}  # pyright: ignore
    name, public = key(files["key"].decode().strip())
    logs = {path.split("/checkpoints/")[0].removeprefix("logs/") for path in files if "/checkpoints/" in path}
    records: dict[str, list[bytes]] = {log: entries(files, log) for log in logs}
    heads: dict[str, list[tuple[int, bytes]]] = {}
    for path, note in files.items():
        if found := re.fullmatch(r"logs/(.*)/checkpoints/(\d+)", path):
            size, root = checkpoint(note, name, public, f"{name}/{found[1]}")
            assert size == int(found[2])
            heads.setdefault(found[1], []).append((size, root))
    for record in records["platform"]:
        fields = json.loads(record)
        if fields["type"] == "tenant.head":
            body = fields["body"]
            heads[f"tenants/{body['tenant']}"].append((body["size"], base64.b64decode(body["root"])))
    for log, signed in heads.items():
        tree = InmemoryTree(algorithm="sha256")
        for record in records[log]:
            tree.append_entry(record)
        for size, root in signed:
            assert tree.get_root(size) == root, f"{log} at {size}"
    everything = [record for log in sorted(logs) for record in records[log]]
    chains(everything, files)
    return len(everything)


def key(text: str) -> tuple[str, bytes]:
    name, digits, encoded = text.split("+", 2)
    raw = base64.b64decode(encoded)
    assert raw[0] == 1
    assert hashlib.sha256(name.encode() + b"\n" + raw).digest()[:4].hex() == digits
    return name, raw[1:]


def checkpoint(note: bytes, name: str, public: bytes, origin: str) -> tuple[int, bytes]:
    text, line = note.decode().split("\n\n")
    dash, signer, encoded = line.rstrip("\n").split(" ")
    assert (dash, signer) == ("\u2014", name)
    Ed25519PublicKey.from_public_bytes(public).verify(base64.b64decode(encoded)[4:], f"{text}\n".encode())
    log, size, root = text.split("\n")
    assert log == origin
    return int(size), base64.b64decode(root)


def entries(files: dict[str, bytes], log: str) -> list[bytes]:
    found: list[bytes] = []
    bundles = {}
    for path, content in files.items():
        if place := re.fullmatch(rf"logs/{log}/tile/entries/((?:x\d\d\d/)*\d\d\d)(?:\.p/(\d+))?", path):
            bundles[int(re.sub(r"[x/]", "", place[1]))] = content, int(place[2] or 256)
    for _number, (content, width) in sorted(bundles.items()):
        for _ in range(width):
            (length,) = struct.unpack(">H", content[:2])
            found.append(content[2 : 2 + length])
            content = content[2 + length :]
        assert not content
    return found


def chains(records: list[bytes], files: dict[str, bytes]) -> None:
    heads: dict[str, tuple[int, str]] = {}
    kinds: dict[str, list[tuple[str, Any]]] = {}
    payloads: dict[str, str] = {}
    erased: list[Any] = []
    for record in records:
        fields = json.loads(record)
        query, body = fields["query"], fields["body"]
        seq, prev = heads.get(query, (0, "0" * 64))
        assert (fields["seq"], fields["prev"]) == (seq, prev), f"{query} at {seq}"
        heads[query] = seq + 1, hashlib.sha256(b"\0" + record).hexdigest()
        kinds.setdefault(query, []).append((fields["type"], body))
        for name, committed in fields["payloads"].items():
            if committed["kept"]:
                payloads[f"payloads/{query}/{seq}/{name}"] = committed["commitment"]
        if fields["type"] == "payload.erased":
            erased.append(body)
    settled: dict[str, Decimal] = {}
    for row in map(json.loads, files["ledger.jsonl"].splitlines()):
        if "query" in row:
            settled[row["query"]] = settled.get(row["query"], Decimal(0)) + Decimal(row["settled_usd"])
    for row in map(json.loads, files["queries.jsonl"].splitlines()):
        cost, ended = calls(kinds[row["query"]])
        assert ended == row["status"]
        assert cost == settled.get(row["query"], 0)
    for path, committed in payloads.items():
        if path in files:
            assert hashlib.sha256(files[path]).hexdigest() == committed
        else:
            _, query, seq, name = path.split("/")
            places = [(one["query"], one["seq"], one["name"]) for one in erased]
            assert {(query, None, None), (query, int(seq), None), (query, int(seq), name)} & set(places), path


def calls(events: list[tuple[str, Any]]) -> tuple[Decimal, str]:
    """What a query cost, and how it ended."""
    waiting: dict[str, Decimal] = {}
    cost, ended = Decimal(0), "open"
    for number, (kind, body) in enumerate(events, 1):
        match kind:
            case "call.intent":
                assert body["call"] not in waiting
                waiting[body["call"]] = Decimal(body["bound_usd"])
            case "call.result":
                assert Decimal(body["cost_usd"]) <= waiting.pop(body["call"])
                cost += Decimal(body["cost_usd"])
            case "query.closed" | "query.interrupted":
                assert body["records"] == number
                assert not waiting
                ended = body.get("status", "interrupted")
            case "query.resumed":
                ended = "open"
            case _:
                pass
    return cost, ended
