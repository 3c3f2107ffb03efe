"""INSERTs of rows that nobody looks at again in the transaction: an object of the ORM would cost more than the row does."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import sqlalchemy
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from registry.db import Table, WriteSession

Rows = Mapping[type[Table], Mapping[str, Any]]


def table_of(entity: type[Table]) -> sqlalchemy.Table:
    return cast(sqlalchemy.Table, entity.__table__)


def insert(session: WriteSession, entity: type[Table]) -> Any:
    """An INSERT that knows ON CONFLICT, which both databases spell alike and SQLAlchemy has twice."""
    return (postgresql if _is_postgresql(session) else sqlite).insert(table_of(entity))


def insert_together(session: WriteSession, rows: Rows) -> None:
    """One row into each table. In one statement on PostgreSQL, which looks at foreign keys when that is over."""
    *others, last = (table_of(entity).insert().values(**{**_scalar_defaults(entity), **values}) for entity, values in rows.items())
    if _is_postgresql(session):
        last = last.add_cte(*(other.cte(f"row_{number}") for number, other in enumerate(others)))
        others = []
    for statement in (*others, last):
        session.execute(statement)


@functools.cache
def _scalar_defaults(entity: type[Table]) -> Mapping[str, Any]:
    """SQLAlchemy would bind them itself, but of two tables in one statement under one name."""
    defaults = ((column.key, column.default) for column in table_of(entity).columns)
    return {name: default.arg for name, default in defaults if isinstance(default, ScalarElementColumnDefault)}


def _is_postgresql(session: WriteSession) -> bool:
    return session.get_bind().dialect.name == "postgresql"
