"""Sessions, units of work, database time. Nobody else opens a connection, and nobody commits inside a service.

One unit of work is one short transaction: `with db.write() as session:` commits at the end and rolls back on any
error. A `WriteSession` is a `ReadSession`, so a function that asks for a write session refuses a read one under
mypy, and readers take both.

On PostgreSQL every transaction says for whom it works, and row-level security holds it to that (`Reach`): one tenant,
nobody, or the system. Who the request or job is for is said once (`reach_tenant`, `reaching_tenant`), and each
transaction that follows carries it, transaction-locally, so that no pooled connection hands it on.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Connection, DateTime, Engine, MetaData, Select, create_engine, event, select
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session, SessionTransaction, sessionmaker
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator

from registry.config import Settings
from registry.postgresql import PoolOptions as PoolOptions  # noqa: PLC0414 - callers have it from here
from registry.postgresql import begin_for, for_sessions, make_postgresql_engine, select_alone

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
    # Ours, because SQLite's own clock has milliseconds: what happened in one of them would have no order. In a subquery,
    # which is evaluated once a statement and not once a row.
    return "(SELECT lorary_now())"


def _sqlite_clock() -> str:
    """SQLite runs in this process, so this host's clock is the database's. Six digits, as SQLAlchemy stores and compares them."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


@compiles(utc_now, "postgresql")
def _postgresql_now(_element: utc_now, _compiler: Any, **_kw: Any) -> str:
    return "clock_timestamp()"


@dataclass(frozen=True)
class Reach:
    """Whose rows a transaction may see and write. Of nobody's tenant unless it says so: a forgotten one sees nothing."""

    tenant_id: str | None = None
    system: bool = False


NOBODY, SYSTEM_REACH = Reach(), Reach(system=True)
_reach: ContextVar[Reach] = ContextVar("lorary_reach", default=NOBODY)


def reach_tenant(tenant_id: str) -> None:
    """From here to the end of this request, transactions work for this tenant."""
    _reach.set(Reach(tenant_id=tenant_id))


def reach_system() -> None:
    """From here to the end of this request, transactions cross tenants: operators' and replicas' requests."""
    _reach.set(SYSTEM_REACH)


@contextmanager
def reaching_tenant(tenant_id: str | None) -> Iterator[None]:
    """Work for a tenant inside the block; for the system where the work belongs to nobody."""
    token = _reach.set(SYSTEM_REACH if tenant_id is None else Reach(tenant_id=tenant_id))
    try:
        yield
    finally:
        _reach.reset(token)


@dataclass(frozen=True)
class _Engines:
    """The application's role and the system's; one and the same where there is one URL."""

    app: Engine
    system: Engine


class ReadSession(Session):
    """A session that is only read from. What it may reach is settled by its first statement."""

    def __init__(self, *, engines: _Engines, reach: Reach | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._engines = engines
        self._reach = reach

    @property
    def reach(self) -> Reach:
        if self._reach is None:
            self._reach = _reach.get()
        return self._reach

    def get_bind(self, *_args: Any, **_options: Any) -> Engine:
        return self._engines.system if self.reach.system else self._engines.app

    def select_alone(self, statement: Select[*tuple[Any, ...]], values: Mapping[str, Any]) -> Sequence[Any]:
        """The rows of a small SELECT of no tenant's, as a transaction of its own where none began yet."""
        if self.in_transaction() or self._engines.app.dialect.name != "postgresql":
            return self.execute(statement, values).all()
        return select_alone(self.get_bind(), statement, values)

    def settle(self) -> None:
        """End the transaction, if one began. For its unit of work alone.

        A read-only one is committed on PostgreSQL: after a ROLLBACK psycopg forgets what it has prepared on the server.
        """
        if self._engines.app.dialect.name == "postgresql":
            self.expunge_all()  # what was added is not written, as on SQLite
            self.commit()
        self.close()


class WriteSession(ReadSession):
    """A session that may be written to; committed by its unit of work alone."""

    def settle(self) -> None:
        try:
            self.commit()
        finally:
            self.close()


@event.listens_for(ReadSession, "after_begin", propagate=True)
def _say_reach(session: ReadSession, transaction: SessionTransaction, connection: Connection) -> None:
    """Transaction-local, and never on connecting: safe behind pgbouncer in transaction mode."""
    if connection.dialect.name == "postgresql" and not transaction.nested:
        begin_for(connection, session.reach.tenant_id or "", read_only=not isinstance(session, WriteSession))


def database_time(session: ReadSession) -> dt.datetime:
    """The database's clock as a value, to compute deadlines from."""
    now: dt.datetime | None = session.scalar(select(utc_now()))
    assert now is not None, "the database did not tell its time"
    return now


class Database:
    """The engines of an installation and its kinds of unit of work.

    SQLite runs in WAL with foreign keys on; writers take BEGIN IMMEDIATE, so two of them queue instead of failing
    half-way with SQLITE_BUSY. On PostgreSQL `system_url` connects as the role that may cross tenants.
    `dispatch`: jobs that are queued leave a hint in the outbox, because a broker waits for it.
    """

    def __init__(
        self, url: str, *, system_url: str = "", busy_timeout_s: float = 15.0, pool: PoolOptions | None = None, dispatch: bool = False
    ) -> None:
        pool = pool or PoolOptions()
        self.engine = _make_engine(url, busy_timeout_s=busy_timeout_s, pool=pool)
        separate = bool(system_url) and make_url(system_url) != make_url(url)
        self.system_engine = _make_engine(system_url, busy_timeout_s=busy_timeout_s, pool=pool) if separate else self.engine
        readers = _Engines(for_sessions(self.engine), for_sessions(self.system_engine))
        writers = _Engines(_for_writing(readers.app), _for_writing(readers.system))
        self._read = sessionmaker(class_=ReadSession, engines=readers, expire_on_commit=False, autoflush=False)
        self._write = sessionmaker(class_=WriteSession, engines=writers, expire_on_commit=False, info={"dispatch": dispatch})

    @property
    def dialect(self) -> str:
        return self.engine.dialect.name

    def open_read(self, reach: Reach | None = None) -> ReadSession:
        """For who ends it by `settle` or `close`: `read` where that is possible."""
        return self._read(reach=reach)

    def open_write(self, reach: Reach | None = None) -> WriteSession:
        """As `open_read`; `settle` commits, `close` rolls back."""
        return self._write(reach=reach)

    @contextmanager
    def read(self) -> Iterator[ReadSession]:
        with self.open_read() as session:
            yield session
            session.settle()

    @contextmanager
    def write(self) -> Iterator[WriteSession]:
        with self.open_write() as session:
            yield session
            session.settle()

    @contextmanager
    def system_read(self) -> Iterator[ReadSession]:
        """Across tenants. Who may is listed in `tests/registry/postgres/test_contract.py`."""
        with self.open_read(SYSTEM_REACH) as session:
            yield session
            session.settle()

    @contextmanager
    def system_write(self) -> Iterator[WriteSession]:
        """Across tenants, like `system_read`."""
        with self.open_write(SYSTEM_REACH) as session:
            yield session
            session.settle()

    def close(self) -> None:
        self.engine.dispose()
        self.system_engine.dispose()


def open_database(settings: Settings) -> Database:
    """The database of an installation, with its pools."""
    pool = PoolOptions(
        size=settings.database_pool_size,
        max_overflow=settings.database_pool_overflow,
        timeout_s=settings.database_pool_timeout_s,
        recycle_s=settings.database_pool_recycle_s,
        connect_timeout_s=settings.database_connect_timeout_s,
        lock_timeout_s=settings.database_lock_timeout_s,
        statement_timeout_s=settings.database_statement_timeout_s,
        prepared=settings.database_prepared_statements,
    )
    return Database(
        settings.resolved_database_url,
        system_url=settings.database_system_url,
        busy_timeout_s=settings.database_busy_timeout_s,
        pool=pool,
        dispatch=settings.has_broker,
    )


def _make_engine(url: str, *, busy_timeout_s: float, pool: PoolOptions) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return make_postgresql_engine(url, pool)
    engine = create_engine(url, pool_size=pool.size, connect_args={"timeout": busy_timeout_s, "check_same_thread": False})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _for_writing(engine: Engine) -> Engine:
    return engine.execution_options(lorary_write=True)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy emits BEGIN itself, below; pysqlite must not
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.create_function("lorary_now", 0, _sqlite_clock)


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("lorary_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


S = TypeVar("S", bound=ReadSession)


# A session does nothing before its first statement, so opening one needs no thread. `routing` ends it in the endpoint's own
# thread; what is left here is what an endpoint or another dependency raised.
async def _read_session(request: Request) -> AsyncIterator[ReadSession]:
    async with _ended(_database(request).open_read()) as session:
        yield session


async def _write_session(request: Request) -> AsyncIterator[WriteSession]:
    async with _ended(_database(request).open_write()) as session:
        yield session


@asynccontextmanager
async def _ended(session: S) -> AsyncIterator[S]:
    try:
        yield session
        if session.in_transaction():
            await run_in_threadpool(session.settle)
    finally:
        if session.in_transaction():
            await run_in_threadpool(session.close)


# scope="function": the transaction ends before the response is sent, so a client never reads back less than it wrote.
ReadSessionDep = Annotated[ReadSession, Depends(_read_session, scope="function")]
WriteSessionDep = Annotated[WriteSession, Depends(_write_session, scope="function")]

# For endpoints that move bytes and open their own short units of work around them.
DatabaseDep = Annotated[Database, Depends(_database)]
