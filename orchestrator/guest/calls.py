"""Sub-calls as cells see them: functions that block, work from any thread, and raise typed exceptions."""

from __future__ import annotations

import os
import threading

from . import wire
from .failures import BatchError, CountExceeded, SubCallError, error_from
from .link import CellOver, Link, Shield

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, TypeGuard

    from .lazytext import LazyText


class Calls:
    """Sub-calls over one link. Threads that wait take turns at reading the replies for all of them."""

    def __init__(self, link: Link, shield: Shield, window: int, batch: int, process: int) -> None:
        self._link = link
        self._shield = shield
        self._slots = threading.Semaphore(window)
        self._window = window
        self._batch = batch
        self._order = threading.Lock()
        self._cond = threading.Condition()
        self._process = process  # the one that may make calls
        self._reading = False
        self._next_id = 1
        self._awaited: set[int] = set()
        self._replies: dict[int, dict[str, Any]] = {}

    def end_cell(self) -> None:
        """No call goes out any more, and no reply is waited for, by the threads that the cell may have left."""
        with self._order:
            self._link.set_in_cell(False)

    def ask(self, op: str, prompt: object, model: str | None = None, context: object = None) -> Any:
        """The reply's value. context: a text or list for a child query; without one it gets its parent's.

        Raises SubCallError.
        """
        with self._slots:
            return self._exchange(op, prompt, model, self._hand_over(context))

    def ask_many(
        self, op: str, prompts: Sequence[object], model: str | None, on_error: str, contexts: Sequence[object] | None
    ) -> list[Any]:
        """All prompts at once, at most `window` in flight; results in the order of the prompts."""
        todo = self._checked(prompts, on_error, contexts)
        results: list[Any] = [None] * len(todo)
        running: dict[int, int] = {}
        try:
            while todo or running:
                # Block for the first place in the window only; take further ones as long as they are free.
                while todo and len(running) < self._window and self._slots.acquire(blocking=not running):
                    position, prompt, context = todo.pop()
                    try:
                        running[self._start(op, prompt, model, self._hand_over(context))] = position
                    except SubCallError as error:  # this one's context was refused
                        self._slots.release()
                        results[position] = error
                    except BaseException:  # whatever it was, no call was made
                        self._slots.release()
                        raise
                if not running:
                    continue
                call, reply = self._wait(set(running))
                self._slots.release()
                results[running.pop(call)] = reply["value"] if reply["ok"] else error_from(reply["error"])
        except Exception:  # of an item that is no text, or too large
            # The others' places are taken until they have ended, as the host counts: else the next calls were too many.
            while running:
                del running[self._wait(set(running))[0]]
                self._slots.release()
            raise
        finally:
            for _ in running:
                self._slots.release()
        failed = [item for item in results if isinstance(item, SubCallError)]
        if failed and on_error == "raise":
            error = BatchError("%d of %d sub-calls failed, the first with: %s" % (len(failed), len(results), failed[0]))
            error.kind, error.results = failed[0].kind, results
            raise error
        return results

    def _checked(self, prompts: Sequence[object], on_error: str, contexts: Sequence[object] | None) -> list[Any]:
        """(position, prompt, context) of each item, the first one last."""
        if on_error not in ("raise", "return"):
            raise ValueError("on_error is 'raise' or 'return'")
        if isinstance(prompts, (str, bytes)):
            raise TypeError("prompts is a list of texts, not one text")
        items = list(prompts)
        belonging = [None] * len(items) if contexts is None else list(contexts)
        if len(belonging) != len(items):
            raise ValueError("%d queries and %d contexts: there has to be one for each" % (len(items), len(belonging)))
        if len(items) > self._batch:
            error = CountExceeded("a batch of %d, and %d are permitted: send it in parts" % (len(items), self._batch))
            error.limit, error.asked, error.left = str(self._batch), str(len(items)), str(self._batch)
            error.kind = "count-exceeded"
            raise error
        return list(zip(range(len(items)), items, belonging))[::-1]

    def _hand_over(self, context: object) -> int | None:
        """Give the host the context for a child query, in pieces; the number that the host knows it by."""
        if context is None:
            return None
        if isinstance(context, (list, tuple)):
            op, pieces = "context_list", _lines(context)  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(context, str) or _is_lazy(context):
            op, pieces = "context_text", _cut(context)
        else:
            raise TypeError("the context of a child query is a text or a list, not %s" % type(context).__name__)
        number = None
        for piece in pieces:
            number = self._exchange("context_more" if number else op, piece, None, number)["context"]
        return number

    def _exchange(self, op: str, prompt: object, model: str | None, context: int | None) -> Any:
        _, reply = self._wait({self._start(op, prompt, model, context)})
        if not reply["ok"]:
            raise error_from(reply["error"])
        return reply["value"]

    def _start(self, op: str, prompt: object, model: str | None, context: int | None) -> int:
        text = prompt if isinstance(prompt, str) else str(prompt)
        # Lone surrogates (from surrogateescape and the like) are not text; the channel would refuse them.
        text = text if text.isascii() else text.encode("utf-8", "replace").decode()
        if model is not None and not isinstance(model, str):  # pyright: ignore[reportUnnecessaryIsInstance]  a cell calls
            raise TypeError("model is the name of a model, as text")
        if os.getpid() != self._process:
            raise RuntimeError("sub-calls work from threads, not from a forked process: use llm_query_batched")
        with self._shield, self._order:  # calls go out in the order of their ids
            if not self._link.in_cell:
                raise SubCallError("the cell is over")
            with self._cond:
                call = self._next_id
                self._next_id += 1
                self._awaited.add(call)
            self._link.send({"type": "call", "id": call, "op": op, "prompt": text, "model": model, "context": context})
        return call

    def _wait(self, calls: set[int]) -> tuple[int, dict[str, Any]]:
        with self._shield:
            while True:
                with self._cond:
                    for call in calls:
                        if call in self._replies:
                            self._awaited.discard(call)
                            return call, self._replies.pop(call)
                    lead = not self._reading
                    if lead:
                        self._reading = True
                    else:
                        self._cond.wait(0.2)
                if lead:
                    self._lead()
                else:
                    self._shield.check()

    def _lead(self) -> None:
        frame: dict[str, Any] | None = None
        try:
            frame = self._link.receive(for_cell=True)
        except CellOver:
            raise SubCallError("the cell is over") from None
        finally:
            with self._cond:
                self._reading = False
                if frame and frame.get("type") == "reply" and frame["id"] in self._awaited:
                    self._replies[frame["id"]] = frame
                self._cond.notify_all()


def _is_lazy(context: object) -> TypeGuard[LazyText]:
    """A document of its own size, in a context of many: its slices are str."""
    from .lazytext import LazyText

    return isinstance(context, LazyText)


def _cut(text: str | LazyText) -> Iterator[str]:
    for start in range(0, max(1, len(text)), wire.PIECE_CHARS):
        yield text[start : start + wire.PIECE_CHARS]


def _lines(items: Sequence[object]) -> Iterator[str]:
    """JSON lines, one an item, in pieces. Raises TypeError and ValueError for what JSON cannot hold."""
    import json

    ready: list[str] = []
    size = 0
    for item in items:
        ready.append(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n")
        size += len(ready[-1])
        if size >= wire.PIECE_CHARS:
            yield from _cut("".join(ready))
            ready, size = [], 0
    if ready or not items:
        yield from _cut("".join(ready))
