"""OpenAI's chat completions and models, over queries: what speaks to OpenAI speaks to this."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Header, Path, Request, Response
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from orchestrator.core.errors import AirlockError, RequestError
from orchestrator.core.units import NANO
from orchestrator.server import inline, queries_view, schemas
from orchestrator.server.chat import errors, retries
from orchestrator.server.chat.conversation import read
from orchestrator.server.chat.errors import documented, error_response, no_such_path, speaks
from orchestrator.server.chat.reasoning import Reasoning
from orchestrator.server.chat.request import PREFIX, ChatRequest, JsonFormat, Ours, SchemaFormat
from orchestrator.server.chat.shapes import (
    STREAM,
    Answered,
    Choice,
    Completion,
    ModelList,
    ModelView,
    QueryFacts,
    Usage,
)
from orchestrator.server.desk import Ask, Asked
from orchestrator.server.lasting import while_let_in
from orchestrator.server.problems import Problem, come_again, problem_of
from orchestrator.server.routes.queries import Asks, Reads, The, own
from orchestrator.server.service import Principal, Service
from orchestrator.server.streaming import EventStream, event, while_there
from orchestrator.server.structure import JsonRoute

PIECE = 4000  # characters of an answer in one event
LOOK_S = 2.0  # between two looks at whether the service stops
_DONE = b"data: [DONE]\n\n"

router = APIRouter(prefix="/v1", tags=["openai"], route_class=JsonRoute)
__all__ = ["error_response", "no_such_path", "router", "speaks"]


@router.post(
    "/chat/completions",
    response_model=Completion,
    responses={
        200: {"description": "the answer; with `stream`, events of chat.completion.chunk", "content": STREAM},
        **documented(400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503),
    },
)
async def create_chat_completion(
    request: Request,
    service: The,
    principal: Asks,
    asked: ChatRequest,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="repeat it to get the answer of before, not another query",
            examples=["minutes-of-march-1"],
        ),
    ] = None,
) -> Response:
    """Ask a question as a chat.

    The last user message is the question. What is long before it is the context, and so is a file, by the id of a
    context: `{"type": "file", "file": {"file_id": "..."}}`. Messages before it that are short, and instructions, stand
    before the question. Where nothing is long, the context is the conversation.

    With `stream`, the steps come as `reasoning_content` while they happen, and then the answer as `content`.
    `response_format` holds the answer to a JSON Schema of at most 64 KiB. `airlock` narrows what the query may. Of the
    body at most 256 KiB may lie outside of its strings: what has more structure is given as a file.

    Taken without effect, as the operator says how models are asked: temperature, top_p, presence_penalty,
    frequency_penalty, logit_bias, seed, max_tokens, max_completion_tokens, top_logprobs, reasoning_effort, verbosity,
    service_tier, store, user, safety_identifier, prompt_cache_key, prompt_cache_retention, prompt_cache_options,
    metadata, parallel_tool_calls.

    Refused: n above 1, logprobs, tools, functions, other modalities than text, stop, audio, prediction, moderation,
    web_search_options.

    A client that goes away, or whose credential ends, ends its query, unless it gave an Idempotency-Key, with which it
    can come again. What OpenAI's clients then ask again by themselves is refused, not asked and paid for anew: wait
    longer (`timeout`), stream, or give the header. An answer costs what the whole query costs: see `airlock.cost_usd`.
    """
    policy = await service.desk.policy_of(principal.tenant)
    model = asked.model.removeprefix(PREFIX)
    if not asked.model.startswith(PREFIX) or model not in service.desk.models_for(policy):
        raise errors.model_not_found(asked.model)
    if "answer" not in policy.audit.payloads:
        raise Problem(403, "not-kept", "the tenant's policy keeps no answers, and what is not kept cannot be given")
    fingerprint = await anyio.to_thread.run_sync(_fingerprint, await request.body())
    if idempotency_key is None:
        retries.require_wanted(request.headers, principal.tenant, fingerprint)
    if asked.stream:
        service.feed.require_room(principal.tenant)
    # First of all: its context may have been deleted since.
    query = await service.desk.before(principal, idempotency_key, fingerprint)
    if query is None:
        query = await _asked(service, principal, asked, idempotency_key, fingerprint)
    answer = _Answer(service, principal, query.id, asked.model)
    headers = {"Airlock-Query": query.id, **({"Idempotency-Replayed": "true"} if query.replayed else {})}
    leave = idempotency_key is not None
    if asked.stream:
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return _Streamed(answer, usage=usage, leave=leave, headers=headers)
    return JSONResponse(await _whole(answer, request, fingerprint, leave=leave), headers=headers)


async def _asked(service: Service, principal: Principal, asked: ChatRequest, key: str | None, told: bytes) -> Asked:
    """The query that is taken on. told: its fingerprint."""
    reading, schema = read(asked.messages), await _schema(principal, asked)
    context = await inline.stored(service, principal, reading.context)
    ours = asked.airlock or Ours()
    return await service.desk.ask(
        principal,
        Ask(
            question=reading.question,
            context=context,
            model=asked.model.removeprefix(PREFIX),
            sub_models=ours.sub_models and [name.removeprefix(PREFIX) for name in ours.sub_models],
            budget=None if ours.budget_usd is None else int(Decimal(ours.budget_usd) * NANO),
            timeout_ms=None if ours.timeout_s is None else max(1, int(ours.timeout_s * 1000)),
            depth=ours.depth,
            answer_schema=schema,
            idempotency=key,
            fingerprint=told,
        ),
    )


def _fingerprint(body: bytes) -> bytes:
    """What is asked, however it is written. Whether it is streamed is no part of it."""
    try:
        asked: dict[str, Any] = json.loads(body)
        return json.dumps(
            {name: asked[name] for name in asked.keys() - {"stream", "stream_options"}}, sort_keys=True
        ).encode()
    except (ValueError, RecursionError):  # it was read before, at less depth
        return body


async def _schema(principal: Principal, asked: ChatRequest) -> Mapping[str, Any] | None:
    match asked.response_format:
        case SchemaFormat(json_schema=told):
            place = "response_format.json_schema.schema"
            try:
                return await schemas.checked(principal, place, told.schema_)
            except RequestError as error:
                raise Problem(400, error.kind, str(error), param=place) from None
        case JsonFormat():
            return {"type": "object"}
        case _:
            return None


@dataclass(slots=True)
class _Answer:
    """A query that is answered as a chat. left: there is nothing more to wait for."""

    service: Service
    principal: Principal
    query: str
    model: str
    left: bool = field(default=False, init=False)

    @property
    def id(self) -> str:
        return f"chatcmpl-{self.query}"

    @property
    def created(self) -> int:
        """Seconds since 1970, as the query's id has it."""
        return int(datetime.strptime(self.query[:15] + "+0000", "%Y%m%d-%H%M%S%z").timestamp())

    async def found(self) -> tuple[dict[str, Any], Usage]:
        """The query that has ended, and what it used. Raises Problem where it has no answer."""
        query, models = await anyio.to_thread.run_sync(self.service.platform.db.look, self._look)
        if query["answer"] is None or query["status"] not in ("answered", "limit"):
            if query["status"] == "answered":
                text = f"the answer is not kept any more (query {self.query})"
                raise Problem(409, "not-kept", text, headers=errors.NO_RETRY)
            raise errors.no_answer(query)
        asked, said = (sum(model[name] for model in models) for name in ("input_tokens", "output_tokens"))
        return query, Usage(prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said)

    def _look(self, tx: queries_view.Connection) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        listed = own(tx, self.service, self.principal, self.query)
        view = queries_view.view(tx, self.service.books, listed)
        return view, list(queries_view.spend(tx, listed)["models"].values())

    def is_left(self) -> bool:
        """Whether the service stops, and the query will go on in the next one."""
        return self.service.under_way.draining and not self.service.under_way.is_here(self.query)

    async def give_up(self) -> None:
        """Its client has gone."""
        await self.service.desk.cancel(self.principal.tenant, self.query)


def _finish(query: Mapping[str, Any]) -> Literal["stop", "length"]:
    return "stop" if query["status"] == "answered" else "length"


def _facts(query: Mapping[str, Any]) -> QueryFacts:
    names = ("status", "reason", "cost_usd", "iterations", "sub_calls")
    return QueryFacts(query_id=query["id"], **{name: query[name] for name in names})


def _stopping(query: str, *, leave: bool = True) -> Problem:
    """leave: who asks again is given the answer of this query; else it would be another one, and this one goes on."""
    problem = come_again(503, "stopping", f"the service stops; the query goes on after that: GET /v1/queries/{query}")
    if leave:
        return problem
    return Problem(503, problem.kind, str(problem), headers={**problem.headers, **errors.NO_RETRY})


# In one piece


async def _whole(answer: _Answer, request: Request, fingerprint: bytes, *, leave: bool) -> dict[str, Any]:
    ended = False
    try:
        async with while_there(request.receive), while_let_in(request):
            while not (ended := await answer.service.under_way.ended(answer.query, LOOK_S)):
                if answer.is_left():
                    break
    except Problem:  # it is let in no more
        if not leave:
            await answer.give_up()
        raise
    if not ended:
        if answer.is_left():
            raise _stopping(answer.query, leave=leave)
        if not leave:
            retries.given_up(answer.principal.tenant, fingerprint)
            await answer.give_up()
        raise Problem(409, "cancelled", "the client has gone")  # which nobody reads
    query, usage = await answer.found()
    made = Completion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=[Choice(message=Answered(content=query["answer"]), finish_reason=_finish(query))],
        usage=usage,
        airlock=_facts(query),
    )
    return made.model_dump()


# As it comes


class _Streamed(EventStream):
    """leave: the query goes on when the client has gone, or is let in no more."""

    def __init__(self, answer: _Answer, *, usage: bool, leave: bool, headers: Mapping[str, str]) -> None:
        super().__init__(_events(answer, usage=usage), headers)
        self._answer, self._leave = answer, leave

    def farewell(self, problem: Problem) -> bytes:
        return event(None, errors.body(problem))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)
        # Not reached when the service itself is stopped, which is no client's wish.
        if not self._answer.left and not self._leave:
            await self._answer.give_up()


async def _events(answer: _Answer, *, usage: bool) -> AsyncGenerator[bytes]:
    """Everything that goes wrong from here on is an event, for the status has been told; one without a name, as old
    clients of OpenAI's see no others."""
    service, tenant = answer.service, answer.principal.tenant
    chunk = partial(_chunk, answer, usage=usage)
    try:
        with service.feed.stream(tenant):
            yield chunk({"role": "assistant", "content": ""})
            reasoning = Reasoning()
            async with aclosing(service.feed.follow(tenant, answer.query)) as records:
                async for record in records:
                    if told := reasoning.told(record):
                        yield chunk({"reasoning_content": told})
                    if record.type == "query.interrupted" and service.under_way.draining:
                        break
                    answer.left = record.type == "query.closed"
            answer.left, ended = True, answer.left
            if not ended:  # the feed ends when the service stops
                raise _stopping(answer.query)
            query, used = await answer.found()
            text = query["answer"]
            for at in range(0, len(text), PIECE):
                yield chunk({"content": text[at : at + PIECE]})
            yield chunk({}, finish=_finish(query), airlock=_facts(query).model_dump())
            if usage:
                yield event(None, {**_frame(answer), "choices": [], "usage": used.model_dump()})
            yield _DONE
    except Problem as problem:
        yield event(None, errors.body(problem))
    except AirlockError as error:
        yield event(None, errors.body(problem_of(error)))


def _frame(answer: _Answer) -> dict[str, Any]:
    return {"id": answer.id, "object": "chat.completion.chunk", "created": answer.created, "model": answer.model}


def _chunk(answer: _Answer, delta: Mapping[str, str], *, usage: bool, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event(None, {**_frame(answer), "choices": [choice], **({"usage": None} if usage else {}), **more})


# Models


@router.get("/models", response_model=ModelList, responses=documented(401, 403, 429, 503))
async def list_models(service: The, principal: Reads) -> ModelList:
    """What can be asked: each of the tenant's models, as a query."""
    policy = await service.desk.policy_of(principal.tenant)
    return ModelList(data=[ModelView(id=PREFIX + name) for name in service.desk.models_for(policy)])


@router.get("/models/{model:path}", response_model=ModelView, responses=documented(400, 401, 403, 404, 422, 429, 503))
async def get_model(
    service: The,
    principal: Reads,
    model: Annotated[str, Path(min_length=1, max_length=512, examples=["rlm/gpt-5-mini"])],
) -> ModelView:
    """One of the tenant's models."""
    for found in (await list_models(service, principal)).data:
        if found.id == model:
            return found
    raise errors.model_not_found(model)
