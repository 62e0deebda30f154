"""Where the database is: the little that differs between a file on this machine and a server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.core.errors import StoreError

BUSY_S = 30  # how long a writer waits for another process's transaction


class Place(ABC):
    """Transactions of `engine` write, and so come one after the other, unless they have the options `reading`.

    An owner is a name for one opened database. Other processes can tell whether it lives; a name is used once.
    """

    engine: sa.Engine
    reading: Mapping[str, Any] = {"readonly": True}

    @abstractmethod
    def claim(self, owner: str) -> sa.Connection:
        """The connection that writes; `owner` lives from now on. Raises StoreError, SQLAlchemyError."""

    @abstractmethod
    def check(self, writer: sa.Connection) -> None:
        """Raise StoreError when others would not see what `writer` writes, or take its owner for dead."""

    def lost(self, writer: sa.Connection) -> bool:
        """Whether `check` will raise for ever: the owner is dead to others, and cannot come back."""
        del writer
        return False

    @abstractmethod
    def migrating(self) -> AbstractContextManager[None]:
        """While the schema may change: other processes that would change it wait."""

    @abstractmethod
    def dead(self, named: Iterable[str]) -> list[str]:
        """Owners that live no more: of those named, and of any that left a trace of another kind. Raises StoreError."""

    def forget(self, owner: str) -> None:
        """Remove the traces of a dead owner. Raises StoreError."""
        del owner

    @abstractmethod
    def scrub(self) -> bool:
        """Leave nothing of what was deleted in the files. False where others hold on to it: to be done again later."""

    @abstractmethod
    def leave(self) -> None:
        """Close; the owner lives no more. Idempotent."""


def store_error(error: SQLAlchemyError) -> StoreError:
    cause = getattr(error, "orig", None) or error
    return StoreError(f"ledger and journal cannot be used: {str(cause).splitlines()[0]}")
