"""Connections to PostgreSQL: made, tested and begun with as few round trips as safety behind pgbouncer allows.

Connections are in the driver's autocommit mode, and a transaction begins by one message of ours that holds BEGIN and its
local settings. The driver would send BEGIN by itself, which is a round trip more in each of a request's transactions.
"""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import psycopg
from sqlalchemy import Connection, Engine, Select, create_engine, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Compiled
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry

TRUSTED_S = 1.0
"""A connection that was in use so recently, and has heard nothing since, is taken as it is; any other is tested first."""
_RETURNED_AT = "lorary_returned_at"
_OF_SESSION = "lorary_of_session"


@dataclass(frozen=True)
class PoolOptions:
    """Of one role's connections. `max_overflow` come beyond `size` under load; the timeouts are PostgreSQL's alone.

    `prepared`: statements that come again and again are prepared once on the server. Not behind a pooler that hands
    each transaction another connection, unless it knows prepared statements.
    """

    size: int = 20
    max_overflow: int = 10
    timeout_s: float = 5.0
    recycle_s: float = 1800.0
    connect_timeout_s: float = 5.0
    lock_timeout_s: float = 5.0
    statement_timeout_s: float = 30.0
    prepared: bool = False


def make_postgresql_engine(url: str, pool: PoolOptions) -> Engine:
    lock_ms, statement_ms = round(pool.lock_timeout_s * 1000), round(pool.statement_timeout_s * 1000)
    limits = f"SET LOCAL lock_timeout = {lock_ms}; SET LOCAL statement_timeout = {statement_ms}"
    engine = create_engine(
        url,
        pool_size=pool.size,
        max_overflow=pool.max_overflow,
        pool_timeout=pool.timeout_s,
        pool_recycle=pool.recycle_s,
        execution_options={"lorary_limits": limits},
        connect_args={
            "autocommit": True,
            "prepare_threshold": 5 if pool.prepared else None,
            "connect_timeout": max(2, round(pool.connect_timeout_s)),
            "application_name": "lorary",
        },
    )
    event.listen(engine, "checkout", _test_if_rested)
    event.listen(engine, "checkin", _note_return)
    event.listen(engine, "begin", _begin)
    return engine


def for_sessions(engine: Engine) -> Engine:
    """The engine for sessions, which begin their transactions themselves, because they know whom for: `begin_for`."""
    return engine.execution_options(**{_OF_SESSION: True})


def begin_for(connection: Connection, tenant_id: str, *, read_only: bool) -> None:
    """Begin a transaction that reaches one tenant, or nobody's rows where `tenant_id` is empty."""
    message = _beginning(connection, tenant_id, read_only=read_only)
    try:
        _driver(connection).execute(message)  # past SQLAlchemy, which would spend five times as long on it
    except psycopg.Error:
        connection.exec_driver_sql(message)  # meets the same again, and knows what it means for connection and pool


def select_alone(engine: Engine, statement: Select[*tuple[Any, ...]], values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of one SELECT in a transaction of its own that reaches no tenant: begun, read and ended by one message.

    For what each request does: the round trips of BEGIN and COMMIT would cost several times what the SELECT does. It is
    planned anew each time, so it should be small; the driver puts the values in, quoted. The columns' types do nothing.
    """
    with engine.connect() as connection:
        compiled = _compiled(statement)
        message: Any = f"{_beginning(connection, '', read_only=True)}; {compiled}; COMMIT"
        try:
            cursor = psycopg.ClientCursor(_driver(connection))
            cursor.execute(message, compiled.construct_params(values))
            while cursor.description is None and cursor.nextset():
                pass
            return cursor.fetchall()
        except psycopg.Error as error:
            broken = _driver(connection).broken
            if broken:
                connection.invalidate(error)
            raise DBAPIError.instance(
                message, values, error, psycopg.Error, connection_invalidated=broken, dialect=engine.dialect
            ) from error


@cache
def _compiled(statement: Select[*tuple[Any, ...]]) -> Compiled:
    dialect: Any = postgresql.psycopg.dialect
    return statement.compile(dialect=dialect())  # the statements are few, and as old as the process


def _driver(connection: Connection) -> psycopg.Connection[Any]:
    return cast("psycopg.Connection[Any]", connection.connection.driver_connection)


def _beginning(connection: Connection, tenant_id: str, *, read_only: bool) -> Any:
    assert tenant_id.isalnum() or not tenant_id, f"a tenant's id is hexadecimal, not {tenant_id!r}"
    limits = connection.get_execution_options()["lorary_limits"]
    begin = "BEGIN READ ONLY" if read_only else "BEGIN"
    return f"{begin}; SET LOCAL app.tenant_id = '{tenant_id}'; {limits}"


def _begin(connection: Connection) -> None:
    if not connection.get_execution_options().get(_OF_SESSION, False):
        connection.exec_driver_sql("BEGIN")


def _note_return(_connection: Any, entry: ConnectionPoolEntry) -> None:
    entry.info[_RETURNED_AT] = time.monotonic()


def _test_if_rested(connection: Any, entry: ConnectionPoolEntry, _proxy: Any) -> None:
    """Raises InvalidatePoolError for a dead one: the pool then throws away all that are as old, and makes a new one.

    A server that ends a connection says so on it, so that a look at the socket tells, without a round trip. Only a host
    or network that vanished in silence is found by asking.
    """
    returned_at = entry.info.get(_RETURNED_AT)
    if returned_at is None or (time.monotonic() - returned_at < TRUSTED_S and not _has_news(connection.fileno())):
        return
    try:
        connection.execute("")
    except connection.Error as error:
        raise InvalidatePoolError("the connection died while it rested") from error


def _has_news(descriptor: int) -> bool:
    """Whether the other side has sent anything, its farewell included."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
