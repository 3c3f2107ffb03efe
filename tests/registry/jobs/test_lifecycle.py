"""Jobs: every transition, every refusal, leases and attempts by the database's clock."""

from __future__ import annotations

import datetime as dt

import pytest
from sqlalchemy import update

from registry.db import Database, database_time
from registry.errors import Conflict, NotFound
from registry.jobs import service
from registry.jobs.models import Job
from registry.jobs.service import Claim, StaleFence

KINDS = ("work",)


def enqueue(database: Database, *, kind: str = "work", max_attempts: int | None = None) -> str:
    with database.write() as session:
        job = service.enqueue(session, kind=kind, tenant_id=None, subject_id="key", payload={"number": 1}, max_attempts=max_attempts)
        return job.id


def claim(database: Database, *, owner: str = "one", lease_s: float = 60.0) -> Claim | None:
    with database.write() as session:
        return service.claim(session, owner=owner, kinds=KINDS, lease_s=lease_s)


def held(database: Database, **options) -> Claim:
    taken = claim(database, **options)
    assert taken is not None
    return taken


def row(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return service.get(session, None, job_id)


def lose_lease(database: Database, job_id: str) -> None:
    """As if the worker had died a lease ago."""
    with database.write() as session:
        expired = database_time(session) - dt.timedelta(seconds=1)
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=expired))


def sweep(database: Database) -> list[str]:
    with database.write() as session:
        return [job.id for job in service.sweep(session)]


def test_from_queue_to_success(database: Database) -> None:
    job_id = enqueue(database)
    taken = held(database)
    assert (taken.job_id, taken.kind, taken.payload, taken.fence, taken.attempt) == (job_id, "work", {"number": 1}, 1, 1)
    running = row(database, job_id)
    assert (running.state, running.lease_owner) == ("running", "one")
    with database.write() as session:
        service.progress(session, taken, {"done": 3, "of": 10})
        service.finish(session, taken, {"answer": 42})
    done = row(database, job_id)
    assert (done.state, done.result, done.progress) == ("succeeded", {"answer": 42}, {"done": 3, "of": 10})
    assert done.finished_at is not None
    assert (done.lease_owner, done.lease_expires_at) == (None, None)


def test_nothing_to_claim(database: Database) -> None:
    assert claim(database) is None
    enqueue(database, kind="other")
    assert claim(database) is None


def test_oldest_first(database: Database) -> None:
    ids = [enqueue(database) for _ in range(3)]
    assert [held(database).job_id for _ in range(3)] == ids
    assert claim(database) is None


def test_enqueue_is_part_of_its_transaction(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as session:
        service.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={})
        raise RuntimeError
    assert claim(database) is None


def test_a_live_lease_is_respected_and_an_expired_one_is_not(database: Database) -> None:
    job_id = enqueue(database)
    first = held(database, owner="one")
    assert claim(database, owner="two") is None
    lose_lease(database, job_id)
    second = held(database, owner="two")
    assert (second.job_id, second.fence, second.attempt) == (job_id, first.fence + 1, 2)


def test_heartbeat_keeps_the_lease(database: Database) -> None:
    job_id = enqueue(database)
    taken = held(database, lease_s=60)
    lose_lease(database, job_id)
    with database.write() as session:
        pulse = service.heartbeat(session, taken)
        assert pulse.lease_expires_at - database_time(session) > dt.timedelta(seconds=50)
    assert not pulse.cancel_requested
    assert claim(database) is None


@pytest.mark.parametrize(
    "write",
    [
        service.heartbeat,
        lambda session, stale: service.progress(session, stale, {"done": 1}),
        lambda session, stale: service.finish(session, stale, {}),
        lambda session, stale: service.fail(session, stale, {"code": "x", "detail": "y"}),
        lambda session, stale: service.fail(session, stale, {"code": "x", "detail": "y"}, retry_in_s=0),
        service.release,
        service.acknowledge_cancel,
    ],
    ids=["heartbeat", "progress", "finish", "fail", "retry", "release", "acknowledge_cancel"],
)
@pytest.mark.parametrize("situation", ["reclaimed", "finished", "released", "swept"])
def test_every_write_under_an_old_fence_is_refused_and_changes_nothing(database: Database, write, situation: str) -> None:
    job_id = enqueue(database, max_attempts=1 if situation == "swept" else 5)
    stale = held(database, owner="slow")
    if situation in {"reclaimed", "swept"}:
        lose_lease(database, job_id)
    with database.write() as session:
        if situation == "reclaimed":
            service.claim(session, owner="fast", kinds=KINDS, lease_s=60)
        elif situation == "finished":
            service.finish(session, stale, {"answer": 1})
        elif situation == "released":
            service.release(session, stale)
        else:
            assert [job.id for job in service.sweep(session)] == [job_id]
    before = _values(row(database, job_id))
    with pytest.raises(StaleFence), database.write() as session:
        write(session, stale)
    assert _values(row(database, job_id)) == before


def _values(job: Job) -> dict:
    return {column.key: getattr(job, column.key) for column in Job.__mapper__.columns}


def test_stale_fence_rolls_back_the_workers_other_writes(database: Database) -> None:
    job_id = enqueue(database)
    stale = held(database)
    lose_lease(database, job_id)
    held(database, owner="two")
    with pytest.raises(StaleFence), database.write() as session:
        service.enqueue(session, kind="published", tenant_id=None, subject_id="key", payload={})
        service.finish(session, stale, {})
    with database.write() as session:
        assert service.claim(session, owner="x", kinds=["published"], lease_s=1) is None


def test_retry_waits_and_counts(database: Database) -> None:
    job_id = enqueue(database, max_attempts=2)
    with database.write() as session:
        first = service.claim(session, owner="one", kinds=KINDS, lease_s=60)
        assert first is not None
        assert service.fail(session, first, {"code": "busy", "detail": "later"}, retry_in_s=3600)
    waiting = row(database, job_id)
    assert (waiting.state, waiting.error, waiting.finished_at) == ("queued", {"code": "busy", "detail": "later"}, None)
    assert claim(database) is None
    with database.write() as session:
        session.execute(update(Job).values(available_at=database_time(session)))
    second = held(database)
    assert second.attempt == 2
    with database.write() as session:
        assert not service.fail(session, second, {"code": "busy", "detail": "again"}, retry_in_s=0)
    assert (row(database, job_id).state, claim(database)) == ("failed", None)


def test_final_failure_is_not_retried(database: Database) -> None:
    job_id = enqueue(database)
    taken = held(database)
    with database.write() as session:
        assert not service.fail(session, taken, {"code": "bad_input", "detail": "no"})
    assert row(database, job_id).error == {"code": "bad_input", "detail": "no"}
    assert claim(database) is None


def test_success_after_a_retry_forgets_the_error(database: Database) -> None:
    job_id = enqueue(database)
    taken = held(database)
    with database.write() as session:
        service.fail(session, taken, {"code": "busy", "detail": "later"}, retry_in_s=0)
    again = held(database)
    with database.write() as session:
        service.finish(session, again)
    assert (row(database, job_id).state, row(database, job_id).error) == ("succeeded", None)


def test_attempts_of_dying_workers_are_capped(database: Database) -> None:
    """A job that kills its worker must not kill all of them for ever."""
    job_id = enqueue(database, max_attempts=3)
    for attempt in (1, 2, 3):
        assert held(database).attempt == attempt
        lose_lease(database, job_id)
    assert claim(database) is None
    sweep(database)
    failed = row(database, job_id)
    assert (failed.state, failed.error and failed.error["code"]) == ("failed", "worker_lost")
    assert "attempt 3 of 3" in (failed.error or {})["detail"]


def test_release_does_not_cost_an_attempt(database: Database) -> None:
    job_id = enqueue(database, max_attempts=1)
    for fence in (1, 2, 3):
        taken = held(database)
        assert (taken.attempt, taken.fence) == (1, fence)
        with database.write() as session:
            service.release(session, taken)
    assert row(database, job_id).state == "queued"


def cancel(database: Database, job_id: str) -> Job:
    with database.write() as session:
        return service.cancel(session, None, job_id)


def test_cancel_queued_is_at_once(database: Database) -> None:
    job_id = enqueue(database)
    assert cancel(database, job_id).state == "cancelled"
    assert row(database, job_id).finished_at is not None
    assert claim(database) is None
    assert cancel(database, job_id).state == "cancelled"


def test_cancel_running_is_heard_by_the_heartbeat(database: Database) -> None:
    job_id = enqueue(database)
    taken = held(database)
    assert cancel(database, job_id).state == "running"
    assert cancel(database, job_id).cancel_requested
    with database.write() as session:
        assert service.heartbeat(session, taken).cancel_requested
        service.acknowledge_cancel(session, taken)
    assert row(database, job_id).state == "cancelled"


def test_cancel_that_came_too_late(database: Database) -> None:
    job_id = enqueue(database)
    taken = held(database)
    cancel(database, job_id)
    with database.write() as session:
        service.finish(session, taken, {"answer": 1})
    assert row(database, job_id).state == "succeeded"


@pytest.mark.parametrize("leave", ["retry", "release", "lost"])
def test_a_cancelled_job_never_goes_back_to_the_queue(database: Database, leave: str) -> None:
    job_id = enqueue(database)
    taken = held(database)
    cancel(database, job_id)
    with database.write() as session:
        if leave == "retry":
            assert not service.fail(session, taken, {"code": "busy", "detail": "later"}, retry_in_s=0)
        elif leave == "release":
            service.release(session, taken)
    if leave == "lost":
        lose_lease(database, job_id)
        sweep(database)
    assert claim(database) is None
    assert row(database, job_id).state == "cancelled"


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_cancel_of_a_finished_job_is_a_conflict(database: Database, state: str) -> None:
    job_id = enqueue(database)
    taken = held(database)
    with database.write() as session:
        if state == "succeeded":
            service.finish(session, taken)
        else:
            service.fail(session, taken, {"code": "x", "detail": "y"})
    with pytest.raises(Conflict, match=state):
        cancel(database, job_id)


def test_unknown_job(database: Database) -> None:
    with pytest.raises(NotFound):
        cancel(database, "nope")
