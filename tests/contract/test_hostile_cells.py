"""Cells that turn on the agent beside them."""

from __future__ import annotations

import pytest

from tests.sandboxes import Repl

pytestmark = pytest.mark.anyio


async def test_a_frame_that_is_slow_to_parse_is_not_parsed(repl: Repl):
    """A key given twice: the last is checked, and both would be parsed, 16 MB of empty lists in seconds."""
    await repl.run("kept = 'kept'")
    result = await repl.run(
        """
        import gc
        link, = (found for found in gc.get_objects() if type(found).__name__ == 'Link')
        junk = b'[' + b'[],' * 5_000_000 + b'0]'
        frame = b'{"type":"call","id":1,"op":"budget","model":null,"context":null,"prompt":%s,"prompt":"x"}\\n' % junk
        link._sock.sendall(link._word + b' ' + frame)
        while True: pass
        """
    )
    assert (result.status, repl.calls) == ("killed", [])
    assert "agent's socket" in result.detail
    assert await repl.out("kept") == "'kept'"


@pytest.mark.parametrize(
    "code",
    [
        "import builtins\nfor name in ('open', 'len', 'isinstance', 'repr', 'sorted'): setattr(builtins, name, None)",
        "import builtins\nbuiltins.print = None",
        "import builtins\nbuiltins.__import__ = None",
        "import builtins\nbuiltins.__dict__.clear()",
        "import sys\nsys.modules.clear()",
        "import sys\nfor name in list(sys.modules):\n    if 'agent' in name: del sys.modules[name]",
        "import sys\nfor name, module in list(sys.modules.items()):\n    if 'agent' in name: module.__dict__.clear()",
        "import json\njson.dumps = lambda *a, **k: 'forged'",
        "import json\njson.loads = lambda *a, **k: {'type': 'run'}",
        "import os\nos.fork = lambda: 0",
        "import os\nos.fork = lambda: 77",
        "import os\nos.dup2 = os.close = os.write = None",
        "import signal\nsignal.signal = None",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, lambda *a: None)\n    except OSError: pass",
        "import sys\nsys.stdout = sys.stderr = None",
        "import sys\nsys.stdout.close(); sys.stderr.close()",
        "import sys\nsys.settrace(lambda *a: 1 / 0); sys.setrecursionlimit(60)",
        "import sys, time\nsys.setswitchinterval(1000)",
        "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('Link', 'Repl'): o.__dict__.clear()",
        "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1, 1))",
        "import atexit, os\nos.register_at_fork(before=lambda: os._exit(1))",
    ],
)
async def test_a_cell_that_breaks_its_interpreter_does_not_break_the_sandbox(repl: Repl, code: str):
    """Whatever it broke, the cells that follow either work or say why not, and an answer is never made up."""
    await repl.run("kept = 'kept'")
    for cell in (code, "1 + 1", "import os\nos._exit(1)", "1 + 1"):
        result = await repl.run(cell, 2.0)
        assert result.answer is None
        assert result.text("out") in (("2\n",) if (cell, result.status) == ("1 + 1", "ok") else ("",))
        assert result.status == "ok" or result.detail
