"""The job shell with a kind of job of its own: what is published when an attempt ends, fails, is cancelled or is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy import Column, Identity, Integer, MetaData, Table, Text, text

from registry.config import Settings
from registry.db import Database, WriteSession
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.jobs.service import Claim
from workers.shell import Attempt, JobKind, Publish, Worker, backoff_s

LEASE_S = 1.2


class Ledger:
    """A kind of job that writes one line of a table for what it did, and one for what was given up."""

    def __init__(self, act: Callable[[Claim, Attempt], None] = lambda _claim, _attempt: None) -> None:
        self.act = act

    def run(self, claim: Claim, attempt: Attempt) -> Publish:
        self.act(claim, attempt)
        return lambda session: self._write(session, f"done {claim.attempt}")

    def give_up(self, session: WriteSession, _tenant_id: str | None, _payload: Mapping[str, Any], code: str, _detail: str) -> None:
        self._write(session, f"gave up: {code}")

    def _write(self, session: WriteSession, line: str) -> dict[str, str]:
        session.execute(text("INSERT INTO ledger (line) VALUES (:line)"), {"line": line})
        return {"outcome": line}


@pytest.fixture
def ledger(database: Database, settings: Settings) -> Iterator[Callable[[], list[str]]]:
    tables = MetaData()
    Table("ledger", tables, Column("number", Integer, Identity(), primary_key=True), Column("line", Text))
    owner = Database(settings.resolved_owner_url)
    tables.create_all(owner.engine)

    def read() -> list[str]:
        with database.read() as session:
            return list(session.scalars(text("SELECT line FROM ledger ORDER BY number")))

    yield read
    tables.drop_all(owner.engine)
    owner.close()


def worker_of(database: Database, ledger: Ledger, *, lease_s: float = LEASE_S) -> Worker:
    return Worker(database, kinds={"ledger": JobKind(run=ledger.run, give_up=ledger.give_up)}, lease_s=lease_s, poll_s=0.02)


def enqueue(database: Database, *, max_attempts: int = 3) -> str:
    with database.write() as session:
        return jobs.enqueue(session, kind="ledger", tenant_id=None, subject_id="s", payload={}, max_attempts=max_attempts).id


def read_job(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return jobs.get(session, None, job_id)


def due_now(database: Database, job_id: str) -> None:
    """Skip the backoff."""
    with database.write() as session:
        session.execute(text("UPDATE jobs SET available_at = '2000-01-01 00:00:00.000000' WHERE id = :id"), {"id": job_id})


Read = Callable[[], list[str]]


def test_publishes_and_finishes_together(database: Database, ledger: Read) -> None:
    job_id = enqueue(database)
    worker = worker_of(database, Ledger())
    assert worker.run_one()
    assert not worker.run_one()
    assert ledger() == ["done 1"]
    job = read_job(database, job_id)
    assert (job.state, job.result, job.attempt) == ("succeeded", {"outcome": "done 1"}, 1)


def test_nothing_is_published_when_the_end_cannot_be_written(database: Database, ledger: Read) -> None:
    """The lease is taken away after the run: `finish` fails, and with it what was published beside it."""
    job_id = enqueue(database)

    def lose(claim: Claim, _attempt: Attempt) -> None:
        with database.write() as session:
            jobs.release(session, claim)

    assert worker_of(database, Ledger(lose)).run_one()
    assert ledger() == []
    assert read_job(database, job_id).state == "queued"


def test_a_failure_is_retried_then_given_up(database: Database, ledger: Read) -> None:
    def fail(_claim: Claim, _attempt: Attempt) -> None:
        raise OSError("the disk is on fire")

    job_id = enqueue(database, max_attempts=2)
    worker = worker_of(database, Ledger(fail))
    assert worker.run_one()
    job = read_job(database, job_id)
    assert (job.state, job.error) == ("queued", {"code": "internal", "detail": "OSError: the disk is on fire"})
    assert not worker.run_one(), "not before its backoff"
    assert ledger() == []
    due_now(database, job_id)
    assert worker.run_one()
    assert read_job(database, job_id).state == "failed"
    assert ledger() == ["gave up: internal"]


def test_a_failure_then_success(database: Database, ledger: Read) -> None:
    def fail_once(claim: Claim, _attempt: Attempt) -> None:
        if claim.attempt == 1:
            raise RuntimeError("once")

    job_id = enqueue(database)
    worker = worker_of(database, Ledger(fail_once))
    worker.run_one()
    due_now(database, job_id)
    worker.run_one()
    assert ledger() == ["done 2"]
    assert read_job(database, job_id).error is None


def test_a_long_job_keeps_its_lease(database: Database, ledger: Read) -> None:
    enqueue(database)
    other = worker_of(database, Ledger())

    def outlast_the_lease(_claim: Claim, _attempt: Attempt) -> None:
        end = time.monotonic() + 3 * LEASE_S
        while time.monotonic() < end:
            assert not other.run_one(), "the job was claimed by two"
            time.sleep(0.05)

    worker_of(database, Ledger(outlast_the_lease)).run_one()
    assert ledger() == ["done 1"]


def test_a_stalled_worker_that_lost_its_job_writes_nothing(database: Database, ledger: Read) -> None:
    """It slept through its lease (a stopped process does not beat); meanwhile another worker finished the job."""
    job_id = enqueue(database)

    def stall(claim: Claim, _attempt: Attempt) -> None:
        with database.write() as session:
            session.execute(text("UPDATE jobs SET lease_expires_at = '2000-01-01 00:00:00.000000' WHERE id = :id"), {"id": claim.job_id})
        assert worker_of(database, Ledger()).run_one()

    assert worker_of(database, Ledger(stall), lease_s=60).run_one()
    assert ledger() == ["done 2"]
    assert read_job(database, job_id).fence == 2


def test_a_lost_lease_stops_a_run_that_asks(database: Database, ledger: Read) -> None:
    enqueue(database)

    def run_until_stopped(claim: Claim, attempt: Attempt) -> None:
        with database.write() as session:
            jobs.release(session, claim)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            attempt.check()
            time.sleep(0.02)
        raise AssertionError("the heartbeat never told of the loss")

    assert worker_of(database, Ledger(run_until_stopped)).run_one()
    assert ledger() == []


def test_cancelling_a_running_job_stops_it(database: Database, ledger: Read) -> None:
    job_id = enqueue(database)

    def run_until_stopped(_claim: Claim, attempt: Attempt) -> None:
        with database.write() as session:
            jobs.cancel(session, None, job_id)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            attempt.check()
            time.sleep(0.02)
        raise AssertionError("the heartbeat never told of the cancellation")

    assert worker_of(database, Ledger(run_until_stopped)).run_one()
    assert ledger() == ["gave up: cancelled"]
    assert read_job(database, job_id).state == "cancelled"


def test_a_job_whose_workers_all_died_is_given_up(database: Database, ledger: Read) -> None:
    job_id = enqueue(database, max_attempts=1)
    with database.write() as session:
        assert jobs.claim(session, owner="dead", kinds=["ledger"], lease_s=-1) is not None
    assert not worker_of(database, Ledger()).run_one()
    assert read_job(database, job_id).state == "failed"
    assert ledger() == ["gave up: worker_lost"]


def test_stop_finishes_the_job_in_hand_and_takes_no_other(database: Database, ledger: Read) -> None:
    first, second = enqueue(database), enqueue(database)
    stop, started = threading.Event(), threading.Event()

    def slow(_claim: Claim, _attempt: Attempt) -> None:
        started.set()
        stop.wait(10)

    thread = threading.Thread(target=worker_of(database, Ledger(slow)).run, args=(stop,))
    thread.start()
    assert started.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert ledger() == ["done 1"]
    assert (read_job(database, first).state, read_job(database, second).state) == ("succeeded", "queued")


def test_a_job_that_outlasts_the_drain_is_given_back_untried(database: Database, ledger: Read) -> None:
    job_id = enqueue(database, max_attempts=1)
    stop, started = threading.Event(), threading.Event()

    def run_until_stopped(_claim: Claim, attempt: Attempt) -> None:
        started.set()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            attempt.check()
            time.sleep(0.02)
        raise AssertionError("nobody told of the drain")

    kinds = {"ledger": JobKind(run=Ledger(run_until_stopped).run, give_up=Ledger().give_up)}
    worker = Worker(database, kinds=kinds, lease_s=LEASE_S, poll_s=0.02, drain_s=0.3)
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    assert started.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    job = read_job(database, job_id)
    assert (job.state, job.attempt) == ("queued", 0), "the attempt does not count"
    assert worker_of(database, Ledger()).run_one()
    assert ledger() == ["done 1"]


def test_a_hint_waits_for_free_hands_and_then_claims_its_job_alone(database: Database, ledger: Read) -> None:
    first, second, third = (enqueue(database) for _ in range(3))
    running, go_on = threading.Event(), threading.Event()

    def slow(claim: Claim, _attempt: Attempt) -> None:
        if claim.job_id == first:
            running.set()
            go_on.wait(10)

    worker = worker_of(database, Ledger(slow))
    polling = threading.Thread(target=worker.run_one)
    polling.start()
    assert running.wait(10)
    assert not worker.run_one(), "hands full"
    hinted = threading.Thread(target=worker.run_hinted, args=(third,))
    hinted.start()
    go_on.set()
    polling.join(10)
    hinted.join(10)
    assert [read_job(database, job_id).state for job_id in (first, second, third)] == ["succeeded", "queued", "succeeded"]
    assert not worker.run_hinted(third), "done already"


@pytest.mark.sqlite
def test_a_database_that_is_away_is_waited_for(database: Database, ledger: Read) -> None:
    enqueue(database)
    with database.write() as session:
        session.execute(text("ALTER TABLE jobs RENAME TO jobs_away"))
    stop = threading.Event()
    thread = threading.Thread(target=worker_of(database, Ledger()).run, args=(stop,))
    thread.start()
    time.sleep(0.1)
    with database.write() as session:
        session.execute(text("ALTER TABLE jobs_away RENAME TO jobs"))
    deadline = time.monotonic() + 15
    while ledger() != ["done 1"]:
        assert time.monotonic() < deadline, "the worker did not come back"
        time.sleep(0.02)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_many_workers_run_every_job_once(database: Database, ledger: Read) -> None:
    for _ in range(12):
        enqueue(database)
    workers = [worker_of(database, Ledger(), lease_s=30) for _ in range(3)]

    def drain(worker: Worker) -> None:
        while worker.run_one():
            pass

    threads = [threading.Thread(target=drain, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ledger() == ["done 1"] * 12


def test_backoff_grows_and_ends() -> None:
    assert 0.8 <= backoff_s(1) <= 1.2
    assert 6.4 <= backoff_s(4) <= 9.6
    assert backoff_s(50) <= 72.0
