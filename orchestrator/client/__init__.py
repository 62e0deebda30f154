"""A client of a service's own routes, in Python: what the OpenAI SDK has no words for.

    with Client("https://airlock.example", key) as client:
        query = client.ask("When did the bell ring?", Path("minutes"))
        for record in client.events(query.id):
            print(record.type)
        print(client.query(query.id).answer)

It blocks, and is for one thread. The key goes to this service and nowhere else, and never over a network in the clear.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, Self

from orchestrator.client.address import address
from orchestrator.client.answers import Budgets, Page, Query, Record, ServiceError, Spend, Stored, Upload, made, parsed
from orchestrator.client.folder import Encoding, as_lines
from orchestrator.console import printable
from orchestrator.core.errors import ContextError, RequestError
from orchestrator.files import Unreadable, Unwritable, draft, open_regular

if TYPE_CHECKING:
    import httpx2

Kind = Literal["text", "json", "jsonl"]

PATIENCE_S = 60.0  # with a connection that breaks, since anything last came over it
AGAIN_S, MOST_AGAIN_S = 0.2, 5.0  # until it is tried again
SILENT_S = 45.0  # that a stream may be, in which the service says something every 15 s
UPLOAD_S = 900.0  # that the service has to make a context of what has come
WHOLE = 16 << 20  # bytes of a file that goes in one request; a longer one goes in pieces
PIECE = 8 << 20
_CHUNK = 1 << 20
_KINDS: Mapping[str, Kind] = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class _Reads(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(slots=True)
class _Patience:
    """With a service that cannot be reached for a while: a restart takes seconds."""

    since: float = field(default_factory=time.monotonic)
    pause: float = AGAIN_S

    def renew(self) -> None:
        self.since, self.pause = time.monotonic(), AGAIN_S

    def wait(self, error: ServiceError) -> None:
        """Until it is tried again. Raises the error where that makes no sense, or makes none any more."""
        if error.status not in (0, 423, 503) or time.monotonic() + self.pause > self.since + PATIENCE_S:
            raise error
        time.sleep(min(error.retry_after or self.pause, MOST_AGAIN_S))
        self.pause = min(2 * self.pause, MOST_AGAIN_S)


class Client:
    """url: of the service, https, or http on this machine. api_key: `al_...`, or a token of the tenant's own issuer.

    A context manager. Every method raises ServiceError.
    """

    def __init__(self, url: str, api_key: str, *, timeout_s: float = 60.0) -> None:
        import httpx2  # slow to load, and of no use to who imports the package for something else

        self.url, self._key, self._timeout_s = address(url), api_key, timeout_s
        if not api_key.isascii() or not api_key.isprintable() or not api_key:
            raise RequestError("the API key has characters that no key has")
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}", "User-Agent": "airlock"},
            timeout=timeout_s,
            trust_env=self.url.startswith("https:"),  # a proxy would read what goes in the clear
            follow_redirects=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def again(self) -> Client:
        """Another one of the same service, with connections of its own."""
        return Client(self.url, self._key, timeout_s=self._timeout_s)

    # Queries

    def ask(
        self,
        question: str,
        context: str | Sequence[Any] | Mapping[str, Any] | Path | Stored,
        *,
        model: str | None = None,
        sub_models: Sequence[str] = (),
        budget_usd: str | None = None,
        timeout_s: float | None = None,
        depth: int | None = None,
        iterations: int | None = None,
        answer_schema: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Query:
        """Ask, and do not wait: the query as it is when it is on record.

        context: a text, a JSON list or object, a file or folder that is uploaded first, or what was uploaded before.
        idempotency_key: asked again with it, it is the same query.
        """
        said = {
            "model": model,
            "sub_models": list(sub_models) or None,
            "budget_usd": budget_usd,
            "timeout_s": timeout_s,
            "depth": depth,
            "iterations": iterations,
            "answer_schema": answer_schema,
        }
        body = {"question": question, "context": self._context(context)}
        body |= {name: value for name, value in said.items() if value is not None}
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return made(Query, self._call("POST", "/v1/queries", json=body, headers=headers))

    def _context(self, context: str | Sequence[Any] | Mapping[str, Any] | Path | Stored) -> dict[str, Any]:
        if isinstance(context, Path):
            context = self.upload(context)
        if isinstance(context, Stored):
            return {"id": context.id}
        return {"text": context} if isinstance(context, str) else {"json": context}

    def query(self, query: str) -> Query:
        return made(Query, self._call("GET", f"/v1/queries/{_name(query)}"))

    def queries(self, status: str | None = None) -> Iterator[Query]:
        """The tenant's, the newest first, without their answers."""
        asked = {} if status is None else {"status": status}
        while True:
            page = made(Page, self._call("GET", "/v1/queries", params=asked))
            yield from page.queries
            if page.next is None:
                return
            asked["cursor"] = page.next

    def cancel(self, query: str) -> Query:
        """End it, wherever it is; one that has ended stays as it is."""
        return made(Query, self._call("POST", f"/v1/queries/{_name(query)}/cancel"))

    def wait(self, query: str, after: int = -1) -> Query:
        """The query, when it has ended. after: the number of the last record that is known."""
        for _record in self.events(query, after):
            pass
        patience = _Patience()
        while True:
            try:
                return self.query(query)
            except ServiceError as error:
                patience.wait(error)

    def events(self, query: str, after: int = -1) -> Iterator[Record]:
        """The query's records after number `after`, as they are written, to the one that closes it.

        A connection that breaks, or a service that is restarted, is taken up again where it was.
        """
        patience = _Patience()
        while True:
            try:
                for record in self._stream(query, after):
                    if record is None:
                        return
                    after = record.seq
                    patience.renew()
                    yield record
                    if record.type == "query.closed":
                        return
                patience.wait(ServiceError(f"{self.url} ends its streams early", kind="unreachable"))
            except ServiceError as error:
                patience.wait(error)

    def _stream(self, query: str, after: int) -> Iterator[Record | None]:
        """What one connection brings; None when there is nothing more to come."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": str(after)} if after >= 0 else {})}
        with (
            self._reaching(),
            self._http.stream("GET", f"/v1/queries/{_name(query)}/events", headers=headers, timeout=SILENT_S) as answer,
        ):
            self._require_good(answer)
            if answer.status_code == 204:
                yield None
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield made(Record, parsed(line.removeprefix("data: ")))

    def spend(self, query: str) -> Spend:
        return made(Spend, self._call("GET", f"/v1/queries/{_name(query)}/spend"))

    def budgets(self) -> Budgets:
        return made(Budgets, self._call("GET", "/v1/budgets"))

    # Audit

    def export(self, query: str, out: Path) -> None:
        """The query's journal, to be checked with `airlock audit verify`, as a file."""
        try:
            with (
                draft(out) as file,
                self._reaching(),
                self._http.stream("GET", f"/v1/audit/queries/{_name(query)}/export") as answer,
            ):
                self._require_good(answer)
                for piece in answer.iter_bytes():
                    file.write(piece)
        except Unwritable as why:
            raise RequestError(f"cannot write {out}: {why}") from None

    def checkpoint(self) -> str:
        """The signed head of the tenant's log."""
        return self._answer("GET", "/v1/audit/checkpoint").text

    def consistency(self, old: int) -> str:
        """That the tenant's log goes on from its first `old` entries, to be checked with `airlock audit verify`."""
        return self._answer("GET", f"/v1/audit/consistency/{old:d}").text

    # Contexts

    def upload(
        self,
        source: Path | _Reads,
        *,
        kind: Kind | None = None,
        name: str = "",
        encoding: Encoding = "utf-8",
        progress: Callable[[int, int], object] = lambda _done, _of: None,
    ) -> Stored:
        """Keep a file, a folder, or a stream of bytes as a context. Raises ContextError where it cannot be read.

        kind: of a file it is told by its name (.json, .jsonl, .ndjson, else text). A folder becomes a list of {"path",
        "text"}, of its readable files. A large file goes in pieces, and where the connection breaks it goes on.
        progress: told the bytes that are there, and of how many.
        """
        about = {"kind": kind or "text", "name": name, "encoding": encoding}
        if not isinstance(source, Path):
            pieces = iter(lambda: source.read(_CHUNK), b"")
            return made(Stored, self._call("PUT", "/v1/contexts", params=about, content=pieces, timeout=UPLOAD_S))
        if source.is_dir():
            with as_lines(source, encoding) as lines:
                return self._file(lines, {"kind": "jsonl", "name": name or _shown(source)}, progress)
        about |= {"kind": kind or _KINDS.get(source.suffix.lower(), "text"), "name": name or _shown(source)}
        return self._file(source, about, progress)

    def _file(self, path: Path, about: Mapping[str, str], progress: Callable[[int, int], object]) -> Stored:
        try:
            with open_regular(path) as file:
                size = path.stat().st_size
                if size <= WHOLE:
                    whole = self._call("PUT", "/v1/contexts", params=about, content=file.read(), timeout=UPLOAD_S)
                    return made(Stored, whole)
                return self._in_pieces(file, size, about, progress)
        except (Unreadable, OSError) as why:
            raise ContextError(f"cannot read {path}: {why}") from None

    def _in_pieces(
        self, file: BinaryIO, size: int, about: Mapping[str, str], progress: Callable[[int, int], object]
    ) -> Stored:
        """As tus 1.0 has it."""
        tus = {"Tus-Resumable": "1.0.0"}
        metadata = ",".join(f"{name} {_base64(value)}" for name, value in about.items() if value)
        begun = self._answer(
            "POST", "/v1/contexts", headers={**tus, "Upload-Length": str(size), "Upload-Metadata": metadata}
        )
        where = re.fullmatch(r".*(/v1/contexts/uploads/[A-Za-z0-9]+)", begun.headers.get("Location", ""))
        if where is None:
            raise ServiceError("the service does not say where the upload goes", status=begun.status_code)
        patience, offset = _Patience(), 0
        while offset < size:
            try:
                file.seek(offset)
                if not (piece := file.read(min(PIECE, size - offset))):
                    raise ContextError("the file has become shorter while it was read: try again")
                headers = {**tus, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
                answer = self._answer("PATCH", where[1], headers=headers, content=piece, timeout=UPLOAD_S)
                patience.renew()
            except ServiceError as error:
                if error.status != 409:  # it is elsewhere than we thought
                    patience.wait(error)
                answer = self._found(where[1], tus, patience)
            offset = _offset(answer)
            progress(offset, size)
        stored = made(Upload, self._call("GET", where[1])).context
        if stored is None:
            raise ServiceError("the service has made no context of the upload")
        return stored

    def _found(self, where: str, tus: Mapping[str, str], patience: _Patience) -> httpx2.Response:
        """How far an upload is."""
        while True:
            try:
                return self._answer("HEAD", where, headers=tus)
            except ServiceError as error:
                patience.wait(error)

    # Over HTTP

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of the answer."""
        return parsed(self._answer(method, path, **options).text)

    def _answer(self, method: str, path: str, **options: Any) -> httpx2.Response:
        with self._reaching():
            answer = self._http.request(method, path, **options)
        self._require_good(answer)
        return answer

    @contextmanager
    def _reaching(self) -> Generator[None]:
        import httpx2

        try:
            yield
        except httpx2.HTTPError as error:
            why = str(error).strip() or type(error).__name__
            raise ServiceError(f"{self.url} cannot be reached: {why}", kind="unreachable") from None

    def _require_good(self, answer: httpx2.Response) -> None:
        if answer.is_success:
            return
        if answer.is_redirect:
            raise ServiceError(f"{self.url} sends elsewhere, where the key does not go", status=answer.status_code)
        try:
            problem: Any = json.loads(answer.read())
            kind, detail = str(problem["type"]).removeprefix("urn:airlock:"), str(problem["detail"])
        except (ValueError, LookupError, TypeError, RecursionError):
            kind, detail = "service", f"{self.url} answers {answer.status_code} {answer.reason_phrase}".strip()
        again = answer.headers.get("Retry-After", "")
        after = float(again) if re.fullmatch("[0-9]{1,6}", again) else None
        line = printable(" ".join(detail.split()))[:2000]  # whatever it is that answers
        raise ServiceError(line, status=answer.status_code, kind=kind, retry_after=after)


def _name(query: str) -> str:
    """An id, which is a part of a path. Raises RequestError."""
    if not re.fullmatch(r"[0-9a-f-]{1,64}", query):
        raise RequestError(f"{query[:100]!r} is not the id of a query")
    return query


def _shown(path: Path) -> str:
    """What the service calls it."""
    return "".join(character for character in path.name if character.isprintable())[:255]


def _base64(text: str) -> str:
    from base64 import b64encode

    return b64encode(text.encode("utf-8", "replace")).decode()


def _offset(answer: httpx2.Response) -> int:
    told = answer.headers.get("Upload-Offset", "")
    if not re.fullmatch("[0-9]{1,18}", told):
        raise ServiceError("the service does not say how far the upload is", status=answer.status_code)
    return int(told)
