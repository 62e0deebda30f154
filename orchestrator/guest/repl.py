"""The REPL: one namespace, the names that the LM is promised, and the running of one cell in it."""

from __future__ import annotations

import builtins
import os
import resource
import sys
from _thread import allocate_lock, stack_size

from . import wire
from .failures import EXCEPTIONS
from .lean import ast
from .link import Link, Shield

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .calls import Calls

_HIDDEN_PREFIX = "_"
THREAD_STACK = 2 << 20  # bytes: the usual 8 MiB would fill a small sandbox with the stacks of a few threads


class Repl:
    """limits: `answer_chars`, `calls_in_flight`, `batch`, `memory_bytes`, as the host's hello gave them."""

    def __init__(self, link: Link, shield: Shield, limits: dict[str, Any]) -> None:
        self._limits = limits
        stack_size(THREAD_STACK)
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        self._all_memory = (most, most)  # with the agent's reserve
        self._cell_memory = (min(int(limits["memory_bytes"]), most), most)
        self._context: object = None
        self._answer: dict[str, Any] = {"content": "", "ready": False}
        self.namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
        self.connect(link, shield)

    def connect(self, link: Link, shield: Shield) -> None:
        """Bind the sub-call functions to a link: at the start, and in a snapshot that has a link of its own."""
        self._link, self._shield, self._process = link, shield, os.getpid()
        self._calls: Calls | None = None
        self._calls_lock = allocate_lock()
        self._scaffold = self._make_scaffold()
        self._restore()

    def end_cell(self) -> None:
        if self._calls is not None:
            self._calls.end_cell()
        else:
            self._link.set_in_cell(False)

    def load_context(self, folder: str) -> None:
        from .context import load

        self._context = self._scaffold["context"] = load(folder, int(self._limits["memory_bytes"]))
        self._restore()

    def run(self, code: str, number: int) -> dict[str, Any]:
        """Run one cell; what it prints goes to fds 1 and 2. Returns the `end` frame. Never raises."""
        self._restore()
        self._answer.update(content="", ready=False)
        before = set(self.namespace)
        _open_streams()
        status, detail = "ok", ""
        try:
            _limit_memory(self._cell_memory)
            _execute(code, "<cell %d>" % number, self.namespace)
        except KeyboardInterrupt:
            status, detail = "timeout", "interrupted"
        except SystemExit as stop:
            status, detail = "error", "SystemExit: %s" % _text(stop.code)
        except BaseException as error:
            _limit_memory(self._all_memory)
            status, detail = "error", _describe(error)
        _limit_memory(self._all_memory)
        answer = None
        try:
            _flush()
            answer = self._take_answer()
        except BaseException as error:
            status, detail = "error", _describe(error)
        names = sorted(n for n in list(self.namespace) if type(n) is str and n not in before and self._is_users(n))
        self._restore()
        return {
            "type": "end",
            "status": status,
            "detail": _text(detail)[: wire.MAX_DETAIL],
            "answer": answer,
            "names": [_text(name)[:256] for name in names[: wire.MAX_NAMES]],
        }

    def _use_calls(self) -> Calls:
        """Made by the first call, for threading is not free to import. Threads may race for it."""
        with self._calls_lock:
            if self._calls is None:
                from .calls import Calls

                window, batch = int(self._limits["calls_in_flight"]), int(self._limits["batch"])
                self._calls = Calls(self._link, self._shield, window, batch, self._process)
            return self._calls

    # The names of the REPL

    def _make_scaffold(self) -> dict[str, Any]:
        calls, namespace, answer = self._use_calls, self.namespace, self._answer

        def llm_query(prompt: object, model: str | None = None) -> str:
            """Ask a sub-LM one self-contained question; returns its text."""
            return calls().ask("llm_query", prompt, model)

        def llm_query_batched(
            prompts: Sequence[object], model: str | None = None, *, on_error: str = "raise"
        ) -> list[Any]:
            """Ask many at once; answers in order. on_error="return" puts exceptions in place of failed answers."""
            return calls().ask_many("llm_query", prompts, model, on_error, None)

        def rlm_query(query: object, context: object = None, model: str | None = None) -> str:
            """Give a question to an RLM of its own, over a text or list; without one, over this context."""
            return calls().ask("rlm_query", query, model, self._handed(context))

        def rlm_query_batched(
            queries: Sequence[object],
            contexts: Sequence[object] | None = None,
            model: str | None = None,
            *,
            on_error: str = "raise",
        ) -> list[Any]:
            """Give many questions to RLMs of their own, each over the context in its place."""
            handed = None if contexts is None else list(map(self._handed, contexts))
            return calls().ask_many("rlm_query", queries, model, on_error, handed)

        def budget() -> dict[str, Any]:
            """What is left of money, sub-calls and time. Advisory."""
            return calls().ask("budget", "")

        def final(content: object) -> None:
            """Give the answer; it is taken when the cell ends."""
            answer.update(content=content, ready=True)
            namespace["answer"] = answer

        def final_var(name: object) -> None:
            """Give the value of a variable as the answer."""
            if isinstance(name, str) and name.isidentifier():
                if name not in namespace:
                    raise NameError("FINAL_VAR: there is no variable %r; SHOW_VARS() lists them" % name)
                final(namespace[name])
            else:
                final(name)

        def show_vars() -> dict[str, str]:
            """The variables made so far, with their types."""
            return {name: type(value).__name__ for name, value in namespace.items() if self._is_users(name)}

        for function, name in ((final, "FINAL"), (final_var, "FINAL_VAR"), (show_vars, "SHOW_VARS")):
            function.__name__ = function.__qualname__ = name
        named = (llm_query, llm_query_batched, rlm_query, rlm_query_batched, budget, final, final_var, show_vars)
        scaffold: dict[str, Any] = {function.__name__: function for function in named}
        scaffold.update({error.__name__: error for error in EXCEPTIONS})
        scaffold["context"] = self._context
        scaffold["answer"] = answer
        return scaffold

    def _handed(self, context: object) -> object:
        # The host has this query's context: nothing of it has to go through the channel.
        return None if context is self._context else context

    def _is_users(self, name: str) -> bool:
        return name not in self._scaffold and not name.startswith(_HIDDEN_PREFIX)

    def _restore(self) -> None:
        self.namespace.update(self._scaffold)

    def _take_answer(self) -> str | None:
        answer: Any = self.namespace.get("answer")
        if not isinstance(answer, dict) or not answer.get("ready"):  # pyright: ignore[reportUnknownMemberType]
            return None
        content: Any = answer.get("content")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if not isinstance(content, str):
            content = _as_json(content)  # pyright: ignore[reportUnknownArgumentType]
        content = _text(content)
        most = int(self._limits["answer_chars"])
        if len(content) > most:
            answer["ready"] = False
            raise ValueError("the answer has %d characters, the limit is %d: give a shorter one" % (len(content), most))
        return content


def _limit_memory(limits: tuple[int, int]) -> None:
    # A cell that used up its memory is told so, out of the agent's reserve. Allocates nothing until that is to be had.
    try:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    except (OSError, ValueError):  # the cell has bound itself closer
        return


def _as_json(value: object) -> str:
    import json

    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def _execute(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Run `code`; as in every REPL, a last expression that is not None is printed."""
    _remember_source(code, name)
    tree: Any = compile(code, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    last: Any = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, name, "exec", dont_inherit=True), namespace)  # noqa: S102  the one purpose of a sandbox
    if last is not None:
        value = eval(compile(last, name, "eval", dont_inherit=True), namespace)  # noqa: S307
        if value is not None:
            print(repr(value))


def _remember_source(code: str, name: str) -> None:
    # Tracebacks show the line that failed only if linecache knows the source; its import waits for a traceback.
    cache = sys.modules.get("linecache")
    if cache is not None:
        cache.cache[name] = (len(code), None, code.splitlines(True), name)
    else:
        _sources[name] = code


_sources: dict[str, str] = {}


def _describe(error: BaseException) -> str:
    """Print the traceback from the cell's own first frame on; return its last line."""
    import linecache
    import traceback

    for name, code in _sources.items():
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    _sources.clear()
    trace = error.__traceback__
    while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<cell "):
        trace = trace.tb_next
    try:
        lines = traceback.format_exception(type(error), error, trace)
        sys.stderr.write("".join(lines))
        sys.stderr.flush()
        return lines[-1].strip()
    except BaseException:  # a cell's exception may have a __str__ that raises, or stderr may be gone
        return type(error).__name__


def _text(value: object) -> str:
    try:
        return str(value).encode("utf-8", "replace").decode()
    except BaseException:  # a __str__ of the cell's own making
        return type(value).__name__


def _open_streams() -> None:
    # Each cell gets working streams, whatever the one before did to them.
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name, None)
        try:
            if stream is not None and stream is _streams.get(fd) and not stream.closed and stream.fileno() == fd:
                continue
        except Exception:  # noqa: S110  an object of the cell's own making: replaced below
            pass
        _streams[fd] = open(  # noqa: SIM115  lives as long as the worker; fd, not path
            fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
        )
        setattr(sys, name, _streams[fd])


def renew_streams() -> None:
    """Open new streams for the next cell: threads that a fork does not have may have held the locks of these."""
    _left.extend(_streams.values())  # not to be closed: that would wait for the lock
    _streams.clear()


_streams: dict[int, Any] = {}
_left: list[Any] = []


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: S112  the cell closed it, or put something else in its place: nothing is left to be shown
            continue


def restore_fds(saved: Sequence[int]) -> None:
    """Make fds 1 and 2 the worker's pipes again, in case a cell closed or replaced them."""
    for fd, copy in zip((1, 2), saved):
        os.dup2(copy, fd)
