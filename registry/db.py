"""Sessions, units of work, database time. Nobody else opens a connection, and nobody commits inside a service.

One unit of work is one short transaction: `with db.write() as session:` commits at the end and rolls back on any
error. A `WriteSession` is a `ReadSession`, so a function that asks for a write session refuses a read one under
mypy, and readers take both.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlalchemy import Connection, DateTime, Engine, MetaData, create_engine, event, select
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(DeclarativeBase):
    """Base of every ORM class. (The domain word "base model" is a different thing: see DESIGN words.)"""

    metadata = MetaData(naming_convention=NAMING)


class UtcDateTime(TypeDecorator[dt.datetime]):
    """Aware UTC datetimes on both databases; a naive one is a programming error."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "naive datetime given to UtcDateTime"
        value = value.astimezone(dt.UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:  # noqa: ARG002 - the signature is SQLAlchemy's
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


class utc_now(FunctionElement[dt.datetime]):
    """The database's clock, inside SQL. Hosts' clocks never decide about leases or expiry."""

    inherit_cache = True
    type = UtcDateTime()
    name = "utc_now"


@compiles(utc_now, "sqlite")
def _sqlite_now(_element: utc_now, _compiler: Any, **_kw: Any) -> str:
    # %f has three digits; SQLAlchemy stores six, and string comparison needs equal widths.
    return "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"


@compiles(utc_now, "postgresql")
def _postgresql_now(_element: utc_now, _compiler: Any, **_kw: Any) -> str:
    return "clock_timestamp()"


class ReadSession(Session):
    """A session that is only read from."""


class WriteSession(ReadSession):
    """A session that may be written to; committed by its unit of work alone."""


def database_time(session: ReadSession) -> dt.datetime:
    """The database's clock as a value, to compute deadlines from."""
    now: dt.datetime | None = session.scalar(select(utc_now()))
    assert now is not None, "the database did not tell its time"
    return now


class Database:
    """One engine and its two kinds of unit of work.

    SQLite runs in WAL with foreign keys on; writers take BEGIN IMMEDIATE, so two of them queue instead of failing
    half-way with SQLITE_BUSY.
    """

    def __init__(self, url: str, *, busy_timeout_s: float = 15.0, pool_size: int = 20) -> None:
        self.engine = _make_engine(url, busy_timeout_s=busy_timeout_s, pool_size=pool_size)
        writer = self.engine.execution_options(lorary_write=True)
        self._read = sessionmaker(self.engine, class_=ReadSession, expire_on_commit=False, autoflush=False)
        self._write = sessionmaker(writer, class_=WriteSession, expire_on_commit=False)

    @property
    def dialect(self) -> str:
        return self.engine.dialect.name

    @contextmanager
    def read(self) -> Iterator[ReadSession]:
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[WriteSession]:
        with self._write.begin() as session:
            yield session

    def close(self) -> None:
        self.engine.dispose()


def _make_engine(url: str, *, busy_timeout_s: float, pool_size: int) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_size=pool_size, pool_pre_ping=True)
    engine = create_engine(url, pool_size=pool_size, connect_args={"timeout": busy_timeout_s, "check_same_thread": False})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy emits BEGIN itself, below; pysqlite must not
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("lorary_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _read_session(request: Request) -> Iterator[ReadSession]:
    with _database(request).read() as session:
        yield session


def _write_session(request: Request) -> Iterator[WriteSession]:
    with _database(request).write() as session:
        yield session


# scope="function": the transaction ends before the response is sent, so a client never reads back less than it wrote.
ReadSessionDep = Annotated[ReadSession, Depends(_read_session, scope="function")]
WriteSessionDep = Annotated[WriteSession, Depends(_write_session, scope="function")]

# For endpoints that move bytes and open their own short units of work around them.
DatabaseDep = Annotated[Database, Depends(_database)]
