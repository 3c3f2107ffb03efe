"""Units of work on pooled connections: each carries its own tenant, and none hands it to the next."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError, ProgrammingError

from registry.blobs.models import Blob
from registry.db import Database, PoolOptions, reach_tenant, reaching_tenant
from registry.tenants.models import Tenant
from tests.postgresql import PostgreSQL

TENANTS = ("acme", "rival", "third")
WHO = text("SELECT current_user, current_setting('app.tenant_id', true)")
VISIBLE = text("SELECT tenant_id FROM blobs")


@pytest.fixture
def database(postgresql_server: PostgreSQL, installation: str) -> Iterator[Database]:
    """Of one connection a role, so that every transaction follows somebody else's."""
    urls = postgresql_server.urls(installation)
    made = Database(urls["database_url"], system_url=urls["database_system_url"], pool=PoolOptions(size=1, max_overflow=0, timeout_s=10.0))
    with made.system_write() as session:
        session.add_all([Tenant(id=name, name=name) for name in TENANTS])
        session.flush()
        session.add_all([Blob(tenant_id=name, sha256=name, size=1) for name in TENANTS])
    yield made
    made.close()


def test_no_tenant_outlives_its_transaction(database: Database) -> None:
    for name in ("acme", "rival", None, "third", None):
        if name is None:
            with database.read() as session:
                assert session.execute(VISIBLE).scalars().all() == []
            continue
        with reaching_tenant(name), database.read() as session:
            assert session.execute(VISIBLE).scalars().all() == [name]


def test_an_error_leaves_no_tenant_behind(database: Database) -> None:
    with pytest.raises(ProgrammingError), reaching_tenant("acme"), database.write() as session:
        session.execute(text("SELECT no_such_column FROM blobs"))
    with database.read() as session:
        assert session.execute(VISIBLE).scalars().all() == []


def test_threads_that_share_a_connection_never_meet(database: Database) -> None:
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        start.wait()
        for _ in range(25):
            name = chance.choice(TENANTS)
            with reaching_tenant(name), (database.read if chance.random() < 0.5 else database.write)() as session:
                assert session.execute(VISIBLE).scalars().all() == [name]

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, seed) for seed in range(6)]:
            done.result()


def test_what_is_reached_is_settled_by_the_first_statement(database: Database) -> None:
    """A session may be opened before the subject is known, as a dependency of an endpoint is."""

    def request() -> None:
        with database.read() as session:
            reach_tenant("acme")
            assert session.execute(VISIBLE).scalars().all() == ["acme"]
            reach_tenant("rival")
            assert session.execute(VISIBLE).scalars().all() == ["acme"], "not changed in the middle of a transaction"

    with ThreadPoolExecutor(1) as pool:
        pool.submit(request).result()


def test_each_role_has_its_own_connections(database: Database) -> None:
    with reaching_tenant("acme"), database.read() as session:
        assert session.execute(WHO).one() == ("lorary_app", "acme")
        with database.system_read() as other:
            assert other.execute(WHO).one() == ("lorary_system", "")
            assert sorted(other.execute(VISIBLE).scalars()) == sorted(TENANTS)
    with reaching_tenant(None), database.read() as session:
        assert session.execute(WHO).one()[0] == "lorary_system"


def test_statements_have_limits_and_are_never_prepared_on_the_server(postgresql_server: PostgreSQL, installation: str) -> None:
    urls = postgresql_server.urls(installation)
    database = Database(urls["database_url"], pool=PoolOptions(size=1, statement_timeout_s=0.2, lock_timeout_s=0.1))
    with database.read() as session:
        for _ in range(12):  # psycopg would prepare after five
            session.execute(text("SELECT count(*) FROM base_models WHERE name = :name"), {"name": "x"})
        assert session.scalar(text("SELECT count(*) FROM pg_prepared_statements")) == 0
        assert session.scalar(text("SHOW lock_timeout")) == "100ms"
    with pytest.raises(OperationalError, match="statement timeout"), database.read() as session:
        session.execute(text("SELECT pg_sleep(5)"))
    database.close()


def test_a_savepoint_keeps_the_tenant(database: Database) -> None:
    with reaching_tenant("acme"), database.write() as session:
        for _ in range(2):
            with session.begin_nested() as inner:
                assert session.execute(VISIBLE).scalars().all() == ["acme"]
                inner.rollback()
        assert session.execute(VISIBLE).scalars().all() == ["acme"]
