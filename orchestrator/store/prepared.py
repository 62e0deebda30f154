"""Statements that every call of a query needs, given to the database's driver as they are.

SQLAlchemy writes the SQL, once for each kind of database. Run by it too, a statement takes 30 to 110 us of CPU, of
which the driver's own part is 4; a call needs ten of them, and that was the largest cost of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError


class Prepared:
    """statement: with a `bindparam` for each value that changes, of a type that drivers take as it is."""

    def __init__(self, statement: sa.ClauseElement) -> None:
        self._statement = statement
        self._compiled: dict[str, tuple[str, Mapping[str, Any], list[str] | None]] = {}

    def __call__(self, tx: sa.Connection, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run in `tx`; the rows of a SELECT or a RETURNING. Raises DBAPIError."""
        sql, constants, order = self._compiled.get(tx.dialect.name) or self._compile(tx.dialect)
        named = {**constants, **values}
        cursor = tx.connection.cursor()
        try:
            cursor.execute(sql, named if order is None else [named[name] for name in order])
            return list(cursor.fetchall()) if cursor.description else []
        except tx.dialect.loaded_dbapi.Error as error:  # pyright: ignore[reportGeneralTypeIssues]
            raise DBAPIError(sql, None, error) from None
        finally:
            cursor.close()

    def _compile(self, dialect: sa.Dialect) -> tuple[str, Mapping[str, Any], list[str] | None]:
        compiled: Any = self._statement.compile(dialect=dialect)
        # positiontup is None where the driver takes parameters by name.
        self._compiled[dialect.name] = str(compiled), compiled.params, compiled.positiontup
        return self._compiled[dialect.name]
