"""Connections to PostgreSQL: made, tested and begun with as few round trips as safety behind pgbouncer allows.

Connections are in the driver's autocommit mode, and a transaction begins by one message of ours that holds BEGIN and its
local settings. The driver would send BEGIN by itself, which is a round trip more in each of a request's transactions.
"""

from __future__ import annotations

import select
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError
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
    assert tenant_id.isalnum() or not tenant_id, f"a tenant's id is hexadecimal, not {tenant_id!r}"
    limits = connection.get_execution_options()["lorary_limits"]
    begin = "BEGIN READ ONLY" if read_only else "BEGIN"
    connection.exec_driver_sql(f"{begin}; SET LOCAL app.tenant_id = '{tenant_id}'; {limits}")


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
