"""Units of work, database time and cursors, on the database that the product uses."""

from __future__ import annotations

import datetime as dt
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from registry.audit.models import AuditEvent
from registry.audit.service import record
from registry.db import Database, UtcDateTime, database_time, utc_now
from registry.errors import BadRequest
from registry.pagination import after_cursor, decode_cursor, encode_cursor, make_page
from registry.tenants.auth import SYSTEM
from registry.tenants.models import ApiKey, Tenant


def test_a_unit_of_work_commits_at_its_end(database: Database) -> None:
    with database.write() as session:
        session.add(Tenant(id="1", name="acme"))
        session.flush()
        with database.read() as other:
            assert other.get(Tenant, "1") is None
    with database.read() as session:
        assert session.get(Tenant, "1") is not None


def test_a_unit_of_work_that_raises_leaves_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as session:
        session.add(Tenant(id="1", name="acme"))
        session.flush()
        raise RuntimeError
    with database.read() as session:
        assert session.get(Tenant, "1") is None


def test_what_a_read_unit_adds_is_never_written(database: Database) -> None:
    with database.read() as session:
        session.add(Tenant(id="1", name="acme"))
    with database.read() as session:
        assert session.get(Tenant, "1") is None


def test_foreign_keys_are_enforced(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(ApiKey(id="k", tenant_id="nobody", name="k", token_hmac="0", scopes=[]))


@pytest.mark.sqlite
def test_writers_queue_and_none_is_lost(database: Database) -> None:
    """Read, decide, write: with deferred transactions two of these would fail half-way or overwrite each other."""
    with database.write() as session:
        session.add(Tenant(id="1", name="0"))
    start = threading.Barrier(6)

    def count_up() -> None:
        start.wait()
        for _ in range(5):
            with database.write() as session:
                tenant = session.get_one(Tenant, "1")
                tenant.name = str(int(tenant.name) + 1)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(count_up) for _ in range(6)]:
            done.result()
    with database.read() as session:
        assert session.get_one(Tenant, "1").name == "30"


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.write() as session:
        session.execute(text("DELETE FROM tenants"))
        started = time.monotonic()
        with database.read() as other:
            assert other.scalars(select(Tenant)).all() == []
        assert time.monotonic() - started < 5


@pytest.mark.sqlite
def test_a_second_writer_gives_up_after_the_busy_timeout(database: Database, settings) -> None:
    impatient = Database(settings.resolved_database_url, busy_timeout_s=0.1)
    with database.write() as session:
        session.execute(text("DELETE FROM tenants"))
        with pytest.raises(OperationalError, match="locked"), impatient.write() as other:
            other.execute(text("DELETE FROM tenants"))
    impatient.close()


def test_database_time_is_utc_and_of_now(database: Database) -> None:
    with database.read() as session:
        now = database_time(session)
    assert now.tzinfo is dt.UTC
    assert abs(now - dt.datetime.now(dt.UTC)) < dt.timedelta(seconds=5)


def test_stored_times_compare_with_the_database_clock(database: Database) -> None:
    """Text of unequal width would sort wrongly: 12:00:00 against 12:00:00.000000."""
    with database.write() as session:
        now = database_time(session).replace(microsecond=0)
        session.add(Tenant(id="past", name="past", deleted_at=now - dt.timedelta(seconds=1)))
        session.add(Tenant(id="future", name="future", deleted_at=now + dt.timedelta(hours=1)))
    with database.read() as session:
        assert session.scalars(select(Tenant.id).where(Tenant.deleted_at <= utc_now())).all() == ["past"]


def test_times_come_back_aware_and_exact(database: Database) -> None:
    moment = dt.datetime(2026, 11, 23, 1, 2, 3, 456789, tzinfo=dt.timezone(dt.timedelta(hours=5)))
    with database.write() as session:
        session.add(Tenant(id="1", name="acme", deleted_at=moment))
    with database.read() as session:
        stored = session.get_one(Tenant, "1").deleted_at
    assert stored == moment
    assert stored is not None
    assert stored.tzinfo is dt.UTC


def test_naive_times_are_a_programming_error(database: Database) -> None:
    with pytest.raises(AssertionError, match="naive"):
        UtcDateTime().process_bind_param(dt.datetime(2026, 1, 1), database.engine.dialect)  # noqa: DTZ001


def test_pages_cover_everything_once_while_rows_are_added(database: Database) -> None:
    """All rows share a millisecond or two: the id breaks ties, and rows that are newer than the cursor stay out."""
    with database.write() as session:
        for number in range(25):
            record(session, SYSTEM, "a.b", "t", str(number))
    seen: list[str] = []
    cursor = None
    while True:
        with database.write() as session:
            rows = session.scalars(after_cursor(select(AuditEvent), cursor, at=AuditEvent.created_at, row_id=AuditEvent.id, limit=4)).all()
            page = make_page(rows, limit=4, key=lambda row: (row.created_at, row.id), show=lambda row: row.resource_id)
            session.execute(text("UPDATE tenants SET name = name"))
        time.sleep(0.002)
        with database.write() as session:
            record(session, SYSTEM, "a.b", "t", "late")
        seen += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    assert sorted(item for item in seen if item != "late") == sorted(str(number) for number in range(25))
    assert "late" not in seen


@given(st.datetimes(timezones=st.just(dt.UTC)), st.text(max_size=40))
def test_cursors_round_trip(moment: dt.datetime, row_id: str) -> None:
    assert decode_cursor(encode_cursor(moment, row_id)) == (moment, row_id)


@given(st.text(max_size=60))
def test_foreign_cursors_are_bad_requests(cursor: str) -> None:
    with pytest.raises(BadRequest):
        decode_cursor(cursor)


@pytest.mark.parametrize("cursor", ["W10", "bnVsbA", "WyIyMDI2LTAxLTAxIiwiYSJd", "W1tbW1tb", "eyJhIjoxfQ", "WzEsMl0"])
def test_json_that_is_not_a_cursor(cursor: str) -> None:
    with pytest.raises(BadRequest):
        decode_cursor(cursor)
