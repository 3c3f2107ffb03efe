"""What SQL a request costs: every statement that an application sends, by either of its roles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fastapi import FastAPI
from sqlalchemy import Engine, Select, event

from registry.postgresql import select_alone


@contextmanager
def recorded(app: FastAPI) -> Iterator[list[str]]:
    """The statements sent inside the block, in order. Values are not in them, but how many an IN list has is."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        # BEGIN holds the tenant's id on PostgreSQL; the last use of keys is written every ten seconds, by a thread of its own.
        if not statement.startswith(("BEGIN", "UPDATE api_keys SET last_used_at")):
            seen.append(statement)

    def note_alone(engine: Engine, statement: Select[Any], values: dict[str, Any]) -> Any:
        seen.append(str(statement.compile(dialect=engine.dialect)))  # goes past SQLAlchemy's cursors
        return select_alone(engine, statement, values)

    engines = {app.state.database.engine, app.state.database.system_engine}
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    try:
        with mock.patch("registry.db.select_alone", note_alone):
            yield seen
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
