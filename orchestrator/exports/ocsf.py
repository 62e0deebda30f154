"""Records as events of the Open Cybersecurity Schema Framework, version 1.8.0: one event a record.

    API Activity (6003)             queries, nodes, LM calls, refusals, limits, keys, erasures: what is asked of Airlock
    Script Activity (1009)          cells
    Application Lifecycle (6002)    sandboxes

What begins something is a Create, what tells how it ended an Update; `status_id` says how. A refusal and a limit also
have the profile `security_control`: denied, blocked. LM calls have `ai_operation`: the model, and the tokens. The whole
body of the record is in `unmapped`. The code of a cell is in it only where that is asked for, other payloads never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.core.events import VERSION as RECORD_VERSION
from orchestrator.core.events import Recorded
from orchestrator.exports.records import VERSION, line, milliseconds, number, part, provider, size, text

OCSF_VERSION = "1.8.0"

CREATE, READ, UPDATE, DELETE = 1, 2, 3, 4  # of API Activity
EXECUTE = 1  # of Script Activity
START, STOP = 3, 4  # of Application Lifecycle
OTHER = 99
INFORMATIONAL, LOW, HIGH = 1, 2, 4  # severities
SUCCESS, FAILURE = 1, 2


Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Class:
    uid: int
    name: str
    of: Callable[[Recorded, Body, bool], dict[str, Any]]


def lines(history: Sequence[Recorded], *, content: bool = False) -> Iterator[str | None]:
    """None for a record of a type that is not known here."""
    intents: dict[str, Body] = {}  # by call
    for record in history:
        if record.type == "call.intent":
            intents[text(record.body, "call")] = record.body
        asked = intents.get(text(record.body, "call"), record.body) if record.type == "call.result" else record.body
        yield line(_event(record, asked, content=content)) if record.type in _TYPES else None


def _event(record: Recorded, asked: Body, *, content: bool) -> dict[str, Any]:
    """asked: who asked which model, which a result does not repeat."""
    of, activity = _TYPES[record.type]
    fields = {**of.of(record, asked, content), **_model(record, asked), **_denial(record)}
    profiles = [name for name, has in _PROFILES.items() if has(of, fields)]
    failed = _failed(record)
    return {
        "class_uid": of.uid,
        "class_name": of.name,
        "category_uid": of.uid // 1000,
        "activity_id": activity,
        **({"activity_name": "End"} if activity == OTHER else {}),
        "type_uid": of.uid * 100 + activity,
        "time": milliseconds(record),
        "severity_id": _severity(record, failed=failed),
        "status_id": FAILURE if failed else SUCCESS,
        **_told("status_detail", text(record.body, "detail") or text(record.body, "reason")),
        "message": f"{record.type} {record.node}",
        "metadata": {
            "version": OCSF_VERSION,
            "product": {"name": "Airlock", "vendor_name": "Airlock", "version": VERSION},
            "uid": f"{record.query}:{record.seq}",
            "correlation_uid": record.query,
            "event_code": record.type,
            "sequence": record.seq,
            "log_name": "journal",
            "log_version": str(RECORD_VERSION),
            "original_time": record.at,
            **_told("tenant_uid", record.tenant),
            **({"profiles": profiles} if profiles else {}),
        },
        **fields,
        "unmapped": {"record": dict(record.body), "payloads": dict(record.committed)},
    }


def _api(record: Recorded, asked: Body, _content: bool) -> dict[str, Any]:
    from_cell = record.type in ("call.refused", "call.repeated") or text(asked, "role") == "sub"
    resource = {"uid": record.query, "name": record.node, "type": "query"}
    if record.type == "context.verified":
        resource = {"uid": text(record.body, "sha256") or record.query, "type": "context"}
    return {
        "actor": _actor(record),
        "api": {"operation": record.type, "service": {"name": "Airlock"}},
        # Who asks is known by the channel: the sandbox of a node, or the loop on the host.
        "src_endpoint": {"name": record.node or "root", "zone": "guest" if from_cell else "host"},
        "resources": [resource],
    }


def _script(record: Recorded, _asked: Body, content: bool) -> dict[str, Any]:
    code = record.payloads.get("code") if content else None
    device = _device(record)
    source: dict[str, Any] = {"value": code or ""}
    if code is None:
        source["is_truncated"] = True
    if code is None and "code" in record.committed:
        source["untruncated_size"] = size(record, "code")
    return {
        "actor": _actor(record),
        "device": device,
        # 3: Python.
        "script": {"type_id": 3, "uid": f"{device['uid']}:{number(record.body, 'cell')}", "script_content": source},
        **({"duration": number(record.body, "duration_ms")} if "duration_ms" in record.body else {}),
    }


def _sandbox(record: Recorded, _asked: Body, _content: bool) -> dict[str, Any]:
    backend, image = text(record.body, "backend"), text(record.body, "image")
    device = _device(record)
    if image:
        device["container"] = {"uid": device["uid"], "runtime": backend, "image": {"uid": image}}
    app = {"name": "sandbox", "uid": device["uid"], **({"feature": {"name": backend}} if backend else {})}
    return {"app": app, "device": device}


def _device(record: Recorded) -> dict[str, Any]:
    """Of a node."""
    return {"type_id": 6, "uid": f"{record.query}:{record.node}", "name": "sandbox"}  # a virtual one


def _actor(record: Recorded) -> dict[str, Any]:
    return {"user": {"uid": record.tenant or "platform", "type_id": 3}}  # a system's: persons are not known here


def _model(record: Recorded, asked: Body) -> dict[str, Any]:
    if record.type not in ("call.intent", "call.result", "call.refused", "call.repeated"):
        return {}
    model = text(asked, "model") or "unknown"
    usage = part(record.body, "usage")
    context: dict[str, Any] = {
        "uid": f"{record.query}:{record.node}",
        "application": {"name": "Airlock"},
        "ai_role_id": 2 if usage else 4,  # an assistant that answered, an agent that asks
    }
    if usage:
        context["prompt_tokens"] = number(usage, "input_tokens")
        context["completion_tokens"] = number(usage, "output_tokens")
    return {"ai_model": {"name": model, "ai_provider": provider(model)}, "message_context": context}


def _denial(record: Recorded) -> dict[str, Any]:
    if record.type not in ("call.refused", "limit.hit"):
        return {}
    rule = {"name": text(record.body, "kind") or record.type, **_told("uid", record.policy)}
    return {"action_id": 2, "disposition_id": 2, "policy": rule}  # denied, blocked


def _failed(record: Recorded) -> bool:
    body = record.body
    match record.type:
        case "call.refused" | "limit.hit":
            return True
        case "call.result":
            return text(body, "outcome") != "answered"
        case "cell.ended":
            return text(body, "status") != "ok"
        case "node.closed" | "query.closed":
            return text(body, "status") != "answered"
        case "sandbox.ended":
            return body.get("oom") is True
        case "context.verified":
            return body.get("unchanged") is False
        case _:
            return False


def _severity(record: Recorded, *, failed: bool) -> int:
    if record.type == "context.verified" and failed:
        return HIGH  # somebody changed what no guest can change
    return LOW if failed else INFORMATIONAL


def _told(name: str, value: str) -> dict[str, str]:
    return {name: value} if value else {}


_API = _Class(6003, "API Activity", _api)
_SCRIPT = _Class(1009, "Script Activity", _script)
_SANDBOX = _Class(6002, "Application Lifecycle", _sandbox)

# What is in an event beyond its class, by which profile.
_PROFILES: Mapping[str, Callable[[_Class, Mapping[str, Any]], bool]] = {
    "ai_operation": lambda _of, fields: "ai_model" in fields,
    "security_control": lambda _of, fields: "action_id" in fields,
    "host": lambda of, _fields: of is _SANDBOX,
    "container": lambda _of, fields: "container" in fields.get("device", {}),
}

_TYPES: Mapping[str, tuple[_Class, int]] = {
    "query.opened": (_API, CREATE),
    "node.opened": (_API, CREATE),
    "call.intent": (_API, CREATE),
    "call.result": (_API, UPDATE),
    "call.refused": (_API, CREATE),
    "call.repeated": (_API, READ),
    "limit.hit": (_API, UPDATE),
    "context.verified": (_API, READ),
    "node.closed": (_API, UPDATE),
    "query.closed": (_API, UPDATE),
    "query.narrowed": (_API, UPDATE),
    "query.interrupted": (_API, UPDATE),
    "query.resumed": (_API, UPDATE),
    "query.scored": (_API, UPDATE),
    "payload.erased": (_API, DELETE),
    "key.created": (_API, CREATE),
    "tenant.head": (_API, CREATE),
    "log.anchored": (_API, CREATE),
    "admin.action": (_API, UPDATE),
    "budget.told": (_API, READ),
    "budget.held": (_API, CREATE),
    "cell.started": (_SCRIPT, EXECUTE),
    "cell.replayed": (_SCRIPT, EXECUTE),
    "cell.ended": (_SCRIPT, OTHER),
    "sandbox.started": (_SANDBOX, START),
    "sandbox.ended": (_SANDBOX, STOP),
}
