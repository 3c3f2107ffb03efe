"""Who goes next: priority, waiting time, one job by its id, and how many a tenant may run at once."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import update

from registry.audit.service import record
from registry.db import Database, database_time
from registry.jobs import service
from registry.jobs.models import Job
from registry.jobs.service import Claim
from registry.tenants import service as tenants
from registry.tenants.auth import SYSTEM


def tenant_id(database: Database, name: str) -> str:
    with database.write() as session:
        return tenants.create_tenant(session, subject=SYSTEM, name=name, record=record).id


def enqueue(database: Database, *, tenant: str | None = None, priority: int | None = None, kind: str = "work") -> str:
    with database.write() as session:
        return service.enqueue(session, kind=kind, tenant_id=tenant, subject_id="key", payload={}, priority=priority).id


def claim(database: Database, *, job_id: str | None = None, max_running: int = 0) -> Claim | None:
    with database.write() as session:
        return service.claim(session, owner="one", kinds=["work"], lease_s=60, job_id=job_id, max_running=max_running)


def claimed(database: Database, count: int, **options: int) -> list[str | None]:
    return [taken.job_id if (taken := claim(database, **options)) else None for _ in range(count)]


def test_priority_before_age_and_age_within_a_priority(database: Database) -> None:
    low, high, other_high = enqueue(database), enqueue(database, priority=7), enqueue(database, priority=7)
    assert claimed(database, 4) == [high, other_high, low, None]


def test_who_has_waited_long_goes_before_every_priority(database: Database) -> None:
    low, _high = enqueue(database), enqueue(database, priority=8)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == low).values(available_at=database_time(session) - dt.timedelta(minutes=11)))
    assert claimed(database, 1) == [low]


def test_validations_go_before_the_rest(database: Database) -> None:
    with database.write() as session:
        job = service.enqueue(session, kind=service.VALIDATE_VERSION, tenant_id=None, subject_id="key", payload={})
        assert (job.priority, job.queue) == (5, "cpu")


def test_a_named_job_is_claimed_once_and_no_other_in_its_place(database: Database) -> None:
    first, second = enqueue(database), enqueue(database)
    taken = claim(database, job_id=second)
    assert taken is not None
    assert taken.job_id == second
    assert claim(database, job_id=second) is None
    assert claim(database, job_id="0" * 32) is None
    assert claimed(database, 2) == [first, None]


def test_a_named_job_of_a_kind_that_we_do_not_do_is_left_alone(database: Database) -> None:
    assert claim(database, job_id=enqueue(database, kind="other")) is None


def test_a_tenant_runs_so_many_at_once_and_the_others_are_not_held_up(database: Database) -> None:
    acme, globex = tenant_id(database, "acme"), tenant_id(database, "globex")
    mine = [enqueue(database, tenant=acme) for _ in range(4)]
    theirs = enqueue(database, tenant=globex)
    operators = [enqueue(database) for _ in range(3)]
    assert claimed(database, 7, max_running=2) == [*mine[:2], theirs, *operators, None]
    assert claim(database, job_id=mine[2], max_running=2) is None, "a hint is no way around"
    with database.write() as session:
        session.execute(update(Job).where(Job.id == mine[0]).values(attempt=5, lease_expires_at=database_time(session) - dt.timedelta(1)))
    assert claimed(database, 2, max_running=2) == [mine[2], None], "a lost job does not count"


def test_the_sweeper_queues_lost_jobs_again(database: Database) -> None:
    job_id = enqueue(database)
    taken = claim(database)
    assert taken is not None
    with database.write() as session:
        session.execute(update(Job).values(lease_expires_at=database_time(session) - dt.timedelta(seconds=1)))
    with database.write() as session:
        assert service.sweep(session, kinds=["other"]) == []
        assert service.get(session, None, job_id).state == "running"
        assert service.sweep(session, kinds=["work"]) == [], "nothing has ended"
        job = service.get(session, None, job_id)
        assert (job.state, job.error and job.error["code"]) == ("queued", "worker_lost")
    again = claim(database)
    assert again is not None
    assert (again.attempt, again.fence) == (2, 2)
