"""What SQL a request costs: every statement that an application sends, by either of its roles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from sqlalchemy import event


@contextmanager
def recorded(app: FastAPI) -> Iterator[list[str]]:
    """The statements sent inside the block, in order. Values are not in them, but how many an IN list has is."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if not statement.startswith("BEGIN"):  # on PostgreSQL it holds the tenant's id
            seen.append(statement)

    engines = {app.state.database.engine, app.state.database.system_engine}
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
