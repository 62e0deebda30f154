"""What speaks to OpenAI speaks to the service: the unmodified SDK, and curl."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import anyio
import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.command import Airlock, until
from tests.service import Served
from tests.service import served as serving

SCRIPT = """
root:
  - |
    I look at it first.

    ```repl
    print(type(context).__name__)
    said = llm_query("Is this long? " + str(context)[:20])
    ```
  - FINAL_VAR(said)
sub:
  - match: '.'
    reply: 'it is short'
"""
SLOW = SCRIPT + "delay_s: 30\n"
QUESTION = [{"role": "user", "content": "Is it long?"}]


def served(airlock: Airlock, *options: object, script: str = SCRIPT, config: str = "") -> Any:
    return serving(airlock, *options, script=script, config=config)


@contextmanager
def sdk(server: Served, tenant: str = "acme", *scopes: str, key: str = "") -> Iterator[OpenAI]:
    with httpx2.Client(trust_env=False, timeout=60) as transport:
        given = key or server.key(tenant, *scopes)
        yield OpenAI(base_url=f"{server.url}/v1", api_key=given, max_retries=0, http_client=transport)


def model(server: Served) -> str:
    return f"rlm/scripted:{server.airlock.folder}/script.yaml"


def create(client: OpenAI, server: Served, messages: Any = QUESTION, **more: Any) -> Any:
    return client.chat.completions.create(model=model(server), messages=messages, **more)


def queries(server: Served, tenant: str = "acme") -> list[dict[str, Any]]:
    with server.client(tenant) as client:
        return client.get("/v1/queries").json()["queries"]


def test_an_answer_in_one_piece(airlock: Airlock):
    with served(airlock) as server, sdk(server) as client:
        answer = create(client, server)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == (
            "assistant",
            "it is short",
            "stop",
        )
        (query,) = queries(server)
        assert answer.id == f"chatcmpl-{query['id']}"
        assert (answer.object, answer.model) == ("chat.completion", model(server))
        with server.client() as native:
            spend = native.get(f"/v1/queries/{query['id']}/spend").json()["models"].values()
        assert answer.usage.prompt_tokens == sum(used["input_tokens"] for used in spend) > 0
        assert answer.usage.completion_tokens == sum(used["output_tokens"] for used in spend) > 0
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        facts = {"query_id": query["id"], "status": "answered", "reason": "", "cost_usd": query["cost_usd"]}
        assert answer.airlock == {**facts, "iterations": 2, "sub_calls": 1}


def test_an_answer_as_it_comes(airlock: Airlock):
    with served(airlock) as server, sdk(server) as client:
        chunks = list(create(client, server, stream=True, stream_options={"include_usage": True}))
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        *spoken, last = chunks
        assert spoken[0].choices[0].delta.role == "assistant"
        assert (last.choices, last.usage.total_tokens > 0) == ([], True)
        deltas = [chunk.choices[0].delta for chunk in spoken]
        assert "".join(delta.content or "" for delta in deltas) == "it is short"
        steps = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert steps.startswith("I look at it first.\n\n```python\nprint(type(context).__name__)\n")
        assert "```text\nlist\n```\n" in steps
        assert re.search(r"\n- scripted:\S+ was asked \d+ bytes and answered 11\n", steps)
        assert "FINAL" not in steps
        assert [chunk.choices[0].finish_reason for chunk in spoken if chunk.choices[0].finish_reason] == ["stop"]
        assert spoken[-1].airlock["query_id"] == queries(server)[0]["id"]


def test_steps_come_while_they_happen(airlock: Airlock):
    with served(airlock, script=SCRIPT + "delay_s: 0.5\n") as server, sdk(server) as client:
        steps = (chunk.choices[0].delta for chunk in create(client, server, stream=True))
        states = [queries(server)[0]["status"] for step in steps if getattr(step, "reasoning_content", None)]
        assert states[0] == "running"


def test_the_stream_helper_and_structured_outputs(airlock: Airlock):
    class Verdict(BaseModel):
        long: bool
        why: str

    script = 'root: [\'FINAL({"long": false, "why": "eleven letters"})\']\n'
    with served(airlock, script=script) as server, sdk(server) as client:
        options: Any = {"model": model(server), "messages": QUESTION, "response_format": Verdict}
        parsed = client.chat.completions.parse(**options).choices[0].message.parsed
        assert parsed == Verdict(long=False, why="eleven letters")
        with client.chat.completions.stream(**options) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert final.choices[0].message.parsed == parsed
        assert kinds[-1] == "content.done"
        said = {
            "role": "assistant",
            "content": "{}",
            "parsed": parsed.model_dump(),
            "refusal": None,
            "tool_calls": None,
        }
        assert create(client, server, [*QUESTION, said, *QUESTION]).choices, "what was parsed may be sent back"
        answer = create(client, server, response_format={"type": "json_object"})
        assert json.loads(answer.choices[0].message.content)["long"] is False


def test_an_answer_that_does_not_fit_its_schema_was_cut_at_a_limit(airlock: Airlock):
    class Verdict(BaseModel):
        long: bool

    policy = airlock.policy(counts_iterations="2")
    with served(airlock, "--policy", policy, script="root: ['FINAL(words)']") as server, sdk(server) as client:
        with pytest.raises(openai.LengthFinishReasonError) as caught:
            client.chat.completions.parse(model=model(server), messages=QUESTION, response_format=Verdict)  # type: ignore[arg-type]
        assert caught.value.completion.choices[0].message.content == "words"
        assert "not accepted" in caught.value.completion.airlock["reason"]  # type: ignore[attr-defined]


def test_the_async_client(airlock: Airlock):
    async def talk(server: Served) -> tuple[str | None, str]:
        key = server.key()
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as transport:
            client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, http_client=transport)
            asked: Any = {"model": model(server), "messages": QUESTION}
            whole = await client.chat.completions.create(**asked)
            parts = [
                chunk.choices[0].delta.content
                async for chunk in await client.chat.completions.create(**asked, stream=True)
            ]
            assert [found.id async for found in client.models.list()] == [model(server)]
            return whole.choices[0].message.content, "".join(part or "" for part in parts)

    with served(airlock) as server:
        assert anyio.run(talk, server) == ("it is short", "it is short")


def test_models(airlock: Airlock):
    with served(airlock) as server, sdk(server) as client:
        (found,) = client.models.list().data
        assert (found.id, found.object, found.owned_by) == (model(server), "model", "airlock")
        assert client.models.retrieve(found.id) == found
        for name in ("rlm/other", "gpt-5", found.id.removeprefix("rlm/")):
            with pytest.raises(openai.NotFoundError) as caught:
                client.models.retrieve(name)
            assert caught.value.code == "model_not_found"


# What of a conversation is the question, and what the context


def asked(server: Served) -> tuple[str, Any]:
    """The question and the context of the newest query."""
    (query, *_) = queries(server)
    with server.client() as client:
        question = client.get(f"/v1/queries/{query['id']}").json()["question"]
    manifest = json.loads((server.airlock.home / "contexts" / "manifests" / query["context"]["id"]).read_bytes())
    data = (server.airlock.home / "contexts" / "data" / manifest["sha256"]).read_text()
    if manifest["kind"] == "jsonl":
        return question, [json.loads(line) for line in data.splitlines()]
    return question, data


SYSTEM = {"role": "system", "content": "Answer in French."}
DOCUMENT = "The bell rang at nine. " * 300
LONG = {"role": "user", "content": DOCUMENT}
BELL = {"role": "user", "content": "When did it ring?"}
TURNS = [{"role": "user", "content": "Good day."}, {"role": "assistant", "content": "What is it?"}]
MARKED = "Instructions:\nAnswer in French.\n\n"
SAID = "Said before, by user:\nGood day.\n\nSaid before, by assistant:\nWhat is it?\n\n"


@pytest.mark.parametrize(
    ("messages", "question", "context"),
    [
        pytest.param([LONG, BELL], "When did it ring?", DOCUMENT, id="one long message before"),
        pytest.param([SYSTEM, LONG, BELL], f"{MARKED}Asked now:\nWhen did it ring?", DOCUMENT, id="with instructions"),
        pytest.param([{**LONG, "role": "system"}, BELL], "When did it ring?", DOCUMENT, id="long instructions"),
        pytest.param([LONG, *TURNS, BELL], "When did it ring?", [LONG, *TURNS], id="a long conversation"),
        pytest.param([BELL], "When did it ring?", [BELL], id="a question alone"),
        pytest.param(
            [SYSTEM, *TURNS, BELL],
            f"{MARKED}{SAID}Asked now:\nWhen did it ring?",
            [SYSTEM, *TURNS, BELL],
            id="a short conversation",
        ),
        pytest.param(
            [SYSTEM, LONG],
            f"{MARKED}Asked now:\nThe context is a request, perhaps with the material that it is about. "
            "Read it, and do what it asks.",
            DOCUMENT,
            id="a long request alone",
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "text", "text": "When did"}, {"type": "text", "text": "it ring?"}]}],
            "When did\nit ring?",
            [{"role": "user", "content": "When did\nit ring?"}],
            id="parts",
        ),
        pytest.param(
            [{"role": "user", "content": "Hm.", "name": "Ann"}, BELL],
            "Said before, by user (Ann):\nHm.\n\nAsked now:\nWhen did it ring?",
            [{"role": "user", "name": "Ann", "content": "Hm."}, BELL],
            id="names",
        ),
    ],
)
def test_a_conversation_is_a_question_and_a_context(messages: Any, question: str, context: Any, airlock: Airlock):
    with served(airlock) as server, sdk(server) as client:
        create(client, server, messages)
        assert asked(server) == (question, context)


def test_a_file_is_the_context(airlock: Airlock):
    with served(airlock) as server, sdk(server) as client, server.client() as native:
        ids = [native.put("/v1/contexts", content=text).json()["id"] for text in ("The bell rang.", "It did not.")]
        files = [{"type": "file", "file": {"file_id": each}} for each in ids]
        first = {"role": "user", "content": [files[0], {"type": "text", "text": "Good day."}]}
        create(client, server, [first, TURNS[1], {**first, "content": [*first["content"], files[0]]}])
        assert asked(server) == (f"{SAID}Asked now:\nGood day.", "The bell rang.")
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, server, [{"role": "user", "content": [*files, {"type": "text", "text": "?"}]}])
        assert caught.value.param == "messages[0].content[1]"
        assert "one context" in caught.value.message
        with sdk(server, "other") as other, pytest.raises(openai.NotFoundError) as foreign:
            create(other, server, [first])
        with pytest.raises(openai.NotFoundError) as unknown:
            create(client, server, [{"role": "user", "content": [_file("0" * 64), {"type": "text", "text": "?"}]}])
        assert foreign.value.body == unknown.value.body


def _file(context: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_id": context}}


def test_an_answer_can_be_sent_back_as_it_came(airlock: Airlock):
    with served(airlock) as server, sdk(server) as client:
        first = create(client, server).choices[0].message
        create(client, server, [*QUESTION, first, BELL])
        question, _context = asked(server)
        assert question.startswith("Said before, by user:\nIs it long?\n\nSaid before, by assistant:\nit is short\n\n")


def test_what_a_query_may_is_narrowed_by_words_of_our_own(airlock: Airlock):
    with served(airlock) as server, sdk(server) as client:
        ours = {"budget_usd": "0.25", "timeout_s": 77, "depth": 1, "sub_models": [model(server)]}
        create(client, server, extra_body={"airlock": ours}, temperature=0.2, max_tokens=100, user="someone", n=1)
        with server.client() as native:
            found = native.get(f"/v1/queries/{queries(server)[0]['id']}").json()
        assert (found["limit_usd"], found["time_limit_s"]) == ("0.25", 77.0)
        assert found["sub_models"] == [model(server).removeprefix("rlm/")]


# What goes wrong


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"n": 2}, "n", "one answer"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "sandbox"),
        ({"logprobs": True}, "logprobs", "log probabilities"),
        ({"modalities": ["text", "audio"]}, "modalities", ""),
        ({"stop": ["."]}, "stop", "whole"),
        ({"extra_body": {"best_of": 2}}, "best_of", "not permitted"),
        ({"extra_body": {"airlock": {"backend": "none"}}}, "airlock.backend", "not permitted"),
        ({"extra_body": {"airlock": {"budget_usd": "much"}}}, "airlock.budget_usd", "openapi.json"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": 1}}}},
            "response_format.json_schema.schema",
            "not a JSON Schema",
        ),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [SYSTEM]}, "messages", "no user message"),
        ({"messages": [BELL, TURNS[1]]}, "messages", "end with a user message"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "no text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "x"}}]}]},
            "messages[0].content[0].file.file_id",
            "required",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            "messages[0].content[0]",
            "type text",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(server: Served, more: dict[str, Any], param: str, said: str):
    with sdk(server) as client, pytest.raises(openai.BadRequestError) as caught:
        create(client, server, **{"messages": QUESTION, **more})
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert said in error.message
    assert queries(server) == []


@pytest.fixture(scope="module")
def server(seed: Any, warm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all that begins no query."""
    from tests.command import copy_home

    folder = tmp_path_factory.mktemp("server")
    command = Airlock(copy_home(seed, folder / "home"), folder, warm)
    with served(command) as running:
        yield running


def test_errors_have_their_classes(server: Served):
    with sdk(server, key="al_unknown") as client, pytest.raises(openai.AuthenticationError) as nobody:
        create(client, server)
    assert (nobody.value.code, nobody.value.type) == ("invalid_api_key", "authentication_error")
    assert nobody.value.response.headers["www-authenticate"] == "Bearer"
    with sdk(server, "acme", "read") as client, pytest.raises(openai.PermissionDeniedError) as reader:
        create(client, server)
    assert reader.value.code == "insufficient_scope"
    with sdk(server) as client, pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)  # type: ignore[arg-type]
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with sdk(server) as client, pytest.raises(openai.APIStatusError) as large:
        create(client, server, [{"role": "user", "content": "x" * (9 << 20)}, BELL])
    assert large.value.status_code == 413
    for raw, status in ((b"{", 400), (b'{"model": "\xff"}', 400), (b"[]", 400), (b'{"model":"\\ud800"}', 400)):
        with server.client() as client:
            answer = client.post("/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
        assert (answer.status_code, set(answer.json())) == (status, {"error"})
    with server.client() as client:
        assert client.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"
        assert client.get("/v1/models/%00%ff").json()["error"]["code"] == "model_not_found"
        assert client.get("/v1/nowhere").json()["type"] == "urn:airlock:not-found"
        no_type = client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
        assert no_type.status_code == 400
    with sdk(server) as client:
        with pytest.raises(openai.NotFoundError, match="chat/completions and GET /v1/models here"):
            client.embeddings.create(model=model(server), input="x")
        with pytest.raises(openai.NotFoundError, match="base_url has to end in /v1"):
            create(client.with_options(base_url=server.url), server)
        with pytest.raises(openai.BadRequestError, match="64 hexadecimal digits: see GET /v1/contexts"):
            create(client, server, [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-abc"}}]}])
        called = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
        with pytest.raises(openai.BadRequestError, match="tool_calls is not taken: a query's code runs in its sandbox"):
            create(client, server, [*QUESTION, called, *QUESTION])


ODD = [
    '{"a":' * 100 + "1" + "}" * 100,
    '{"properties":{"a":' * 400 + "{}" + "}}" * 400,
    '{"a":' * 40_000 + "1" + "}" * 40_000,
    '{"a": "\\ud800"}',
    '{"\\ud800": 1}',
    '{"a": 1' + "0" * 400 + "}",
    '{"a": 1' + "0" * 5000 + "}",
    '{"minimum": NaN}',
    '{"$ref": "http://127.0.0.1:9/"}',
    '{"pattern": "(a+)+$"}',
]


def test_nothing_in_a_body_is_a_fault_of_the_service(airlock: Airlock):
    """Deep, huge, half of a character, no number: wherever anything may stand."""
    policy = airlock.policy(counts_iterations="1")
    with served(airlock, "--policy", policy, script="root: ['FINAL(1)']") as server, server.client() as client:
        named = json.dumps({"model": model(server), "messages": QUESTION})[:-1]
        headers = {"Content-Type": "application/json"}
        for number, value in enumerate(ODD):
            schema = '{"type": "json_schema", "json_schema": {"name": "n", "schema": %s}}' % value  # noqa: UP031  braces
            for more in (f'"metadata": {value}', f'"response_format": {schema}', f'"seed": {value}'):
                headers["Idempotency-Key"] = str((number, more[:5]))
                answer = client.post("/v1/chat/completions", content=f"{named}, {more}}}".encode(), headers=headers)
                assert answer.status_code in (200, 400, 422), answer.text
                assert ("error" in answer.json()) is (answer.status_code != 200)


def test_rates_and_money_have_their_classes(airlock: Airlock):
    config = "[server]\nqueries = 1\nqueue_tenant = 1\n"
    with served(airlock, script=SLOW, config=config) as server, sdk(server) as client, server.client() as native:
        for _ in range(2):
            native.post("/v1/queries", json={"question": "q", "context": {"text": "a"}})
            until(lambda: queries(server)[-1]["status"] == "running")
        with pytest.raises(openai.RateLimitError) as full:
            create(client, server)
        assert (full.value.code, full.value.type) == ("queue_full", "rate_limit_error")
        assert int(full.value.response.headers["retry-after"]) > 0
        for query in queries(server):
            native.post(f"/v1/queries/{query['id']}/cancel")


def test_spent_money_is_an_insufficient_quota(airlock: Airlock):
    price = f"scripted:{airlock.folder}/script.yaml=1000,1000"
    with served(airlock, "--price", price) as server, sdk(server) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            create(client, server, extra_body={"airlock": {"budget_usd": "0.001"}})
        assert (caught.value.status_code, caught.value.type) == (402, "insufficient_quota")
        assert caught.value.code == "budget_exhausted"


LOOKS = "root:\n  - |\n    ```repl\n    print(1)\n    ```\n"


def test_a_last_word_was_cut_at_a_limit(airlock: Airlock):
    policy = airlock.policy(counts_iterations="1")
    with served(airlock, "--policy", policy, script=f"{LOOKS}  - FINAL(half)\n") as server, sdk(server) as client:
        answer = create(client, server)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("half", "length")
        assert answer.airlock["status"] == "limit"
        assert answer.airlock["reason"].startswith("count-exceeded: ")


def test_a_limit_without_an_answer_is_an_error(airlock: Airlock):
    policy = airlock.policy(counts_iterations="2")
    with served(airlock, "--policy", policy, script=LOOKS) as server, sdk(server) as client:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            create(client, server)
        assert caught.value.code == "count_exceeded"
        assert queries(server)[0]["id"] in caught.value.message
        assert caught.value.response.headers["x-should-retry"] == "false"
        stream = create(client, server, stream=True)
        seen: list[Any] = []
        with pytest.raises(openai.APIError, match="all 2 turns are used") as late:
            seen.extend(stream)
        assert late.value.code == "count_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_time_that_is_used_up_is_a_time_out(airlock: Airlock, stream: bool):
    def answer(client: OpenAI, server: Served) -> None:
        chunks = create(client, server, stream=stream, extra_body={"airlock": {"timeout_s": 3}})
        assert not stream or list(chunks)

    with served(airlock, script=LOOKS.replace("print(1)", "while True: pass")) as server, sdk(server) as client:
        with pytest.raises(openai.APIError) as caught:
            answer(client, server)
        assert caught.value.code == "time_exceeded"
        assert getattr(caught.value, "status_code", None) == (None if stream else 422)


def test_a_provider_that_fails_is_a_bad_gateway(airlock: Airlock):
    config = '[models."gone"]\nbase_url = "http://127.0.0.1:9/v1"\n'
    with served(airlock, "--price", "gone=1,1", config=config) as server, sdk(server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="rlm/gone", messages=QUESTION)  # type: ignore[arg-type]
        assert (caught.value.status_code, caught.value.type) == (502, "server_error")
        assert caught.value.code == "provider_busy"
        assert "127.0.0.1:9" not in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_ends_the_query(airlock: Airlock, stream: bool):
    with served(airlock, script=SLOW) as server:
        _leave(server, stream=stream)
        ended = until(lambda: (found := queries(server)[0])["ended_at"] and found)
        assert (ended["status"], ended["reason"]) == ("cancelled", "cancelled")


@pytest.mark.parametrize("stream", [False, True])
def test_a_service_that_stops_leaves_the_query_to_the_next_one(airlock: Airlock, stream: bool):
    config = "[server]\ndrain_s = 0\n"
    with served(airlock, script=SLOW, config=config) as server, sdk(server) as client:
        with ThreadPoolExecutor(1) as thread:

            def ask() -> Any:
                answer = create(client, server, stream=stream)
                return list(answer) if stream else answer

            asked = thread.submit(ask)
            until(lambda: (found := queries(server)) and found[0]["status"] == "running")
            (query,) = queries(server)
            until(lambda: "call.intent" in {row["type"] for row in airlock.records(query["id"])})
            server.stop()
            with pytest.raises(openai.APIError) as caught:
                asked.result(30)
        assert caught.value.code == "stopping"
        assert stream or caught.value.response.headers["x-should-retry"] == "false", "it would be another query"  # type: ignore[attr-defined]
        assert query["id"] in caught.value.message
    with served(airlock, config=config) as server:
        ended = until(lambda: (found := queries(server)[0])["status"] not in ("interrupted", "running") and found)
        assert (ended["id"], ended["status"]) == (query["id"], "answered")


def test_a_client_that_repeats_what_it_gave_up_pays_once(airlock: Airlock):
    with served(airlock, script=SLOW) as server, sdk(server) as client:
        impatient = client.with_options(max_retries=2, timeout=3)
        with pytest.raises(openai.UnprocessableEntityError, match="set a longer timeout") as caught:
            create(impatient, server)
        assert caught.value.code == "given_up"
        ended = until(lambda: (found := queries(server))[0]["ended_at"] and found)
        assert [query["status"] for query in ended] == ["cancelled"]


def test_who_can_come_again_does_not(airlock: Airlock):
    with served(airlock, script=SCRIPT + "delay_s: 1\n") as server, sdk(server) as client:
        key = {"Idempotency-Key": "mine"}
        body = _leave(server, stream=False, headers=key)
        answer = client.chat.completions.with_raw_response.create(**body, extra_headers=key)
        assert answer.headers["idempotency-replayed"] == "true"
        assert answer.headers["airlock-query"] == queries(server)[0]["id"]
        assert answer.parse().choices[0].message.content == "it is short"
        assert len(queries(server)) == 1
        with pytest.raises(openai.UnprocessableEntityError) as other:
            create(client, server, [BELL], extra_headers=key)
        assert other.value.code == "idempotency_key_reused"


def _leave(server: Served, *, stream: bool, headers: Any = None) -> dict[str, Any]:
    """Ask, and hang up while the query runs; what was asked."""
    body: dict[str, Any] = {"messages": QUESTION, "model": model(server)}
    request = json.dumps({**body, "stream": stream})
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as line:
        more = {"Authorization": f"Bearer {server.key()}", "Content-Type": "application/json", **(headers or {})}
        lines = [f"{name}: {value}" for name, value in more.items()]
        head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}:{port}", f"Content-Length: {len(request)}", *lines]
        line.sendall(("\r\n".join(head) + "\r\n\r\n" + request).encode())
        until(lambda: (found := queries(server)) and found[0]["status"] == "running")
    return body


def test_curl(airlock: Airlock):
    with served(airlock) as server:
        body = {"model": model(server), "messages": QUESTION}
        assert json.loads(_curl(server, body))["choices"][0]["message"]["content"] == "it is short"
        events = _curl(server, {**body, "stream": True}).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        texts = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
        assert "".join(text.get("content", "") for text in texts) == "it is short"


def _curl(server: Served, body: dict[str, Any]) -> str:
    headers = ["-H", f"Authorization: Bearer {server.key()}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sSN", "--noproxy", "*", f"{server.url}/v1/chat/completions", *headers, "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
