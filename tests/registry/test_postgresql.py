"""What differs between the databases, on a real PostgreSQL: the schema, the clock, row locks, keyset cursors, keys."""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import select, update

import migrations
from registry.app import create_app
from registry.audit.models import AuditEvent
from registry.audit.service import record
from registry.bootstrap import init_database
from registry.config import Settings
from registry.db import Database, database_time
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.pagination import after_cursor, make_page
from registry.tenants.auth import SYSTEM
from registry.tenants.models import ApiKey
from tests.registry.conftest import bearer

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pgserver")
    pytest.importorskip("psycopg")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()


@pytest.fixture
def postgresql(url: str) -> Iterator[Database]:
    migrations.upgrade(url)
    database = Database(url)
    yield database
    database.close()
    migrations.downgrade(url, "base")


def test_schema_there_and_back(url: str) -> None:
    migrations.upgrade(url)
    assert migrations.check(url) == []
    migrations.downgrade(url, "base")
    assert migrations.revision_of(url) is None
    migrations.upgrade(url)
    assert migrations.revision_of(url) == migrations.head_revision()
    migrations.downgrade(url, "base")


def test_an_installation_answers(url: str, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, database_url=url, secret_key=SecretStr("s" * 40))
    made, again = init_database(settings), init_database(settings)
    assert made.admin_token is not None
    assert again.admin_token is None
    admin = bearer(made.admin_token)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        assert client.get("/readyz").json()["status"] == "ok"
        assert client.post("/api/v1/tenants", json={"name": "acme"}, headers=admin).status_code == 201
        assert client.post("/api/v1/tenants", json={"name": "acme"}, headers=admin).status_code == 409
        key = client.post(
            "/api/v1/keys", json={"name": "k", "scopes": ["inference"], "expires_in_s": 600}, headers=bearer(made.admin_token, "acme")
        ).json()
        assert client.get("/api/v1/whoami", headers=bearer(key["token"])).json()["tenant"] == "acme"
        database = Database(url)
        with database.write() as session:
            past = database_time(session) - dt.timedelta(milliseconds=1)
            session.execute(update(ApiKey).where(ApiKey.id == key["id"]).values(expires_at=past))
        database.close()
        assert client.get("/api/v1/whoami", headers=bearer(key["token"])).status_code == 401
    migrations.downgrade(url, "base")


def test_tenants_made_at_the_same_moment_are_a_conflict(url: str, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, database_url=url, secret_key=SecretStr("s" * 40))
    token = init_database(settings).admin_token
    assert token is not None
    start = threading.Barrier(6)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:

        def make(_: int) -> int:
            start.wait()
            return client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(token)).status_code

        with ThreadPoolExecutor(6) as pool:
            answers = Counter(pool.map(make, range(6)))
    assert answers == {201: 1, 409: 5}
    migrations.downgrade(url, "base")


def test_many_claimers_never_share_a_job(postgresql: Database) -> None:
    with postgresql.write() as session:
        for _ in range(40):
            jobs.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={})
    start = threading.Barrier(8)

    def work(owner: str) -> list[str]:
        start.wait()
        mine = []
        while True:
            with postgresql.write() as session:
                taken = jobs.claim(session, owner=owner, kinds=["work"], lease_s=60)
            if taken is None:
                return mine
            mine.append(taken.job_id)
            with postgresql.write() as session:
                jobs.finish(session, taken)

    with ThreadPoolExecutor(8) as pool:
        claimed = [job_id for ids in pool.map(work, map(str, range(8))) for job_id in ids]
    assert len(claimed) == len(set(claimed)) == 40


def test_cancel_against_release_never_strands_a_job(postgresql: Database) -> None:
    """Queued again with a cancellation nobody will hear would be a job that stays for ever."""
    for _ in range(30):
        with postgresql.write() as session:
            job_id = jobs.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={}).id
        with postgresql.write() as session:
            taken = jobs.claim(session, owner="one", kinds=["work"], lease_s=60)
            assert taken is not None
        start = threading.Barrier(2)

        def release(start: threading.Barrier = start, taken: jobs.Claim = taken) -> None:
            start.wait()
            with postgresql.write() as session:
                jobs.release(session, taken)

        def cancel(start: threading.Barrier = start, job_id: str = job_id) -> None:
            start.wait()
            try:
                with postgresql.write() as session:
                    jobs.cancel(session, None, job_id)
            except jobs.Conflict:
                with postgresql.write() as session:
                    jobs.cancel(session, None, job_id)

        with ThreadPoolExecutor(2) as pool:
            for done in (pool.submit(release), pool.submit(cancel)):
                done.result()
        with postgresql.read() as session:
            assert session.get_one(Job, job_id).state == "cancelled"


def test_cursors_cover_everything_once(postgresql: Database) -> None:
    with postgresql.write() as session:
        for number in range(23):
            record(session, SYSTEM, "a.b", "t", str(number))
    seen: list[str] = []
    cursor = None
    while True:
        with postgresql.read() as session:
            rows = session.scalars(after_cursor(select(AuditEvent), cursor, at=AuditEvent.created_at, row_id=AuditEvent.id, limit=4)).all()
        page = make_page(rows, limit=4, key=lambda row: (row.created_at, row.id), show=lambda row: row.resource_id)
        seen, cursor = seen + page.items, page.next_cursor
        if cursor is None:
            break
    assert sorted(seen) == sorted(str(number) for number in range(23))
