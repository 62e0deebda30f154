"""TEMP"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio


class Turns:
    def __init__(self, capacity: int) -> None:
        self._sem = anyio.Semaphore(capacity)

    @asynccontextmanager
    async def turn(self, who: str, weight: int, most: int | None = None) -> AsyncGenerator[None]:
        async with self._sem:
            yield
