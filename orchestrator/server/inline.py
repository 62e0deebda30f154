"""The context of a query: given within the request, or by the id of one that the tenant has."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar, cast

import anyio
import anyio.from_thread
import anyio.to_thread
from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from orchestrator.core.context import Context
from orchestrator.core.errors import AirlockError, ContextError
from orchestrator.core.turns import Turns
from orchestrator.server.few import Few
from orchestrator.server.housekeeping import remove_later
from orchestrator.server.problems import not_found
from orchestrator.server.service import Principal, Service
from orchestrator.store import holdings
from orchestrator.store.contexts import ContextStore
from orchestrator.store.holdings import Held

_ingests = Turns(4)  # at once: they are CPU and disk, and must not take all threads from the others
T = TypeVar("T")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _path(path: str) -> str:
    if _UNPRINTABLE.search(path):
        raise ValueError("a path has no control characters")
    if any(part in ("", ".", "..") for part in re.split(r"[/\\]", path)):
        raise ValueError("a path is relative, with / between its parts, none of them empty, `.` or `..`")
    return path


class _Strict(Few):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Document(_Strict):
    """path: what the model is told the document is called; it is never opened."""

    path: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_path)]
    text: str


class GivenText(_Strict):
    text: str

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "The bell rang at nine."}]})


class GivenDocuments(_Strict):
    documents: Annotated[list[Document], Field(min_length=1, fail_fast=True)]

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"documents": [{"path": "log/monday.txt", "text": "The bell rang at nine."}]}]}
    )

    @model_validator(mode="after")
    def _each_once(self) -> GivenDocuments:
        seen = set[str]()
        for number, document in enumerate(self.documents):
            if document.path in seen:
                raise ValueError(f"document {number} has the path of one before it")
            seen.add(document.path)
        return self


class GivenJson(_Strict):
    value: Annotated[Any, Field(alias="json", description="any JSON value")]

    model_config = ConfigDict(json_schema_extra={"examples": [{"json": {"bells": [{"rang": "09:00"}]}}]})


class GivenId(_Strict):
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"}]}
    )


_FORMS = {"text": GivenText, "documents": GivenDocuments, "json": GivenJson, "id": GivenId}


def _form(given: Any) -> str | None:
    names = cast("dict[str, object]", given) if isinstance(given, dict) else {}
    return next((name for name, form in _FORMS.items() if name in names or isinstance(given, form)), None)


Given = Annotated[
    Annotated[GivenText, Tag("text")]
    | Annotated[GivenDocuments, Tag("documents")]
    | Annotated[GivenJson, Tag("json")]
    | Annotated[GivenId, Tag("id")],
    Discriminator(
        _form,
        custom_error_type="context_form",
        custom_error_message="has to be an object with one of text, documents, json and id",
    ),
]


async def stored(service: Service, principal: Principal, given: Given) -> Context:
    """The context, kept for the tenant. Raises Problem, ContextError, CountExceeded, StoreError.

    One given by id may be deleted before a query is on record that has it; see `holdings.holds`.
    """
    if isinstance(given, GivenId):
        return await anyio.to_thread.run_sync(_own, service, principal.tenant, given.id)
    return await in_turn(_ingests, principal.tenant, partial(_ingest, service, principal.tenant, given))


async def in_turn(turns: Turns, tenant: str, work: Callable[[], T]) -> T:
    """What `work` brings, in a thread, when the tenant has its turn. One never has all places."""
    async with turns.turn(tenant, 1, most=turns.most_of_one):
        return await anyio.to_thread.run_sync(work)


def _own(service: Service, tenant: str, context_id: str) -> Context:
    if not service.platform.db.look(lambda tx: holdings.holds(tx, tenant, context_id)):
        raise not_found("context")
    return service.platform.contexts.open(context_id)


def _ingest(service: Service, tenant: str, given: GivenText | GivenDocuments | GivenJson) -> Context:
    record = partial(_hold, service=service, tenant=tenant)
    store = store_of(service, service.settings.inline_bytes, record)
    match given:
        case GivenText():
            return store.ingest_value(given.text)
        case GivenDocuments():
            return store.ingest_value([document.model_dump() for document in given.documents])
        case GivenJson(value=list() | dict()) if given.value:
            return store.ingest_value(given.value)
        case GivenJson():
            return store.ingest_stream(io.BytesIO(_json(given.value)), kind="json", name="context")


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ContextError("context: JSON cannot hold it; pass text, numbers, lists and objects") from None


def _hold(context: Context, service: Service, tenant: str) -> tuple[Held, bool]:
    most = service.settings.stored_bytes
    try:
        return service.platform.db.write_sync(lambda tx: holdings.hold(tx, tenant, context, "", most))
    except AirlockError:
        remove_later(service, context.id)
        raise


def store_of(service: Service, most: int, placed: Callable[[Context], object]) -> ContextStore:
    """The service's store, for one context of a tenant. See `ContextStore`."""
    return ContextStore(service.home / "contexts", check=anyio.from_thread.check_cancelled, most=most, placed=placed)
