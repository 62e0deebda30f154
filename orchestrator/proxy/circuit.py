"""TEMP"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class Circuit:
    @contextmanager
    def attempt(self, key: str) -> Generator[None]:
        yield
