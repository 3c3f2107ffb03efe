"""Jobs under concurrency, and under every order of events that hypothesis thinks of."""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule
from sqlalchemy import select, update

from registry.db import Database, Table, database_time
from registry.errors import Conflict
from registry.jobs import service
from registry.jobs.models import FINAL, Job, JobEvent
from registry.jobs.service import Claim, StaleFence

KINDS = ("work",)


def _enqueue(database: Database, count: int) -> None:
    with database.write() as session:
        for _ in range(count):
            service.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={})


def test_many_claimers_never_share_a_job(database: Database) -> None:
    _enqueue(database, 40)
    start = threading.Barrier(8)

    def work(owner: str) -> list[str]:
        start.wait()
        mine = []
        while True:
            with database.write() as session:
                taken = service.claim(session, owner=owner, kinds=KINDS, lease_s=60)
            if taken is None:
                return mine
            mine.append(taken.job_id)
            with database.write() as session:
                service.finish(session, taken)

    with ThreadPoolExecutor(8) as pool:
        claimed = [job_id for ids in pool.map(work, map(str, range(8))) for job_id in ids]
    assert Counter(claimed).most_common(1)[0][1] == 1
    assert len(claimed) == 40


def test_two_claimers_of_one_expired_lease(database: Database) -> None:
    for _ in range(10):
        _enqueue(database, 1)
        with database.write() as session:
            old = service.claim(session, owner="dead", kinds=KINDS, lease_s=60)
            assert old is not None
        with database.write() as session:
            past = database_time(session) - dt.timedelta(seconds=1)
            session.execute(update(Job).where(Job.id == old.job_id).values(lease_expires_at=past))
        start = threading.Barrier(2)

        def take(owner: str, start: threading.Barrier = start) -> Claim | None:
            start.wait()
            with database.write() as session:
                return service.claim(session, owner=owner, kinds=KINDS, lease_s=60)

        with ThreadPoolExecutor(2) as pool:
            taken = [claim for claim in pool.map(take, ("a", "b")) if claim is not None]
        assert len(taken) == 1
        with database.write() as session:
            service.finish(session, taken[0])


def test_finish_and_cancel_at_the_same_time_leave_one_outcome(database: Database) -> None:
    for _ in range(10):
        _enqueue(database, 1)
        with database.write() as session:
            taken = service.claim(session, owner="one", kinds=KINDS, lease_s=60)
            assert taken is not None
        start = threading.Barrier(2)

        def finish(start: threading.Barrier = start, taken: Claim = taken) -> None:
            start.wait()
            with database.write() as session:
                service.finish(session, taken)

        def cancel(start: threading.Barrier = start, taken: Claim = taken) -> bool:
            start.wait()
            try:
                with database.write() as session:
                    service.cancel(session, None, taken.job_id)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            finishing, cancelling = pool.submit(finish), pool.submit(cancel)
            finishing.result()
            cancelling.result()
        with database.read() as session:
            assert service.get(session, None, taken.job_id).state == "succeeded"


class JobMachine(RuleBasedStateMachine):
    """Workers that claim, stall, die, wake up again with old claims; tenants that cancel; a model of who holds what."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.database = Database(f"sqlite:///{Path(self.folder.name) / 'jobs.sqlite3'}")
        Table.metadata.create_all(self.database.engine)
        self.holder: dict[str, int] = {}  # job -> the fence that is in force
        self.results: dict[str, int] = {}  # job -> the fence that finished it
        self.fences: dict[str, int] = {}

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @rule(target=jobs, max_attempts=st.integers(1, 3))
    def enqueue(self, max_attempts: int) -> str:
        with self.database.write() as session:
            return service.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={}, max_attempts=max_attempts).id

    @rule(target=claims)
    def claim(self):
        with self.database.write() as session:
            taken = service.claim(session, owner="any", kinds=KINDS, lease_s=60)
        if taken is None:
            return multiple()
        assert taken.job_id not in self.results, "a finished job was claimed"
        assert taken.fence > self.fences.get(taken.job_id, 0), "a fence came twice"
        assert taken.attempt <= taken.max_attempts
        self.fences[taken.job_id] = self.holder[taken.job_id] = taken.fence
        return taken

    @rule()
    def sweep(self) -> None:
        """Lost jobs end, or go back to the queue."""
        with self.database.write() as session:
            service.sweep(session)
        with self.database.read() as session:
            running = set(session.scalars(select(Job.id).where(Job.state == "running")))
        self.holder = {job_id: fence for job_id, fence in self.holder.items() if job_id in running}

    @rule(job_id=jobs)
    def lease_runs_out(self, job_id: str) -> None:
        with self.database.write() as session:
            past = database_time(session) - dt.timedelta(seconds=1)
            session.execute(update(Job).where(Job.id == job_id, Job.state == "running").values(lease_expires_at=past))

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        try:
            with self.database.write() as session:
                service.cancel(session, None, job_id)
        except Conflict:
            assert self._row(job_id).state in {"succeeded", "failed"}

    @rule(taken=claims, verb=st.sampled_from(["heartbeat", "progress", "finish", "fail", "retry", "release", "acknowledge_cancel"]))
    def worker_writes(self, taken: Claim, verb: str) -> None:
        in_force = self.holder.get(taken.job_id) == taken.fence
        try:
            with self.database.write() as session:
                self._write(session, taken, verb)
        except StaleFence:
            assert not in_force, f"{verb} was refused to the holder"
            return
        assert in_force, f"{verb} was accepted from fence {taken.fence}, in force is {self.holder.get(taken.job_id)}"
        if verb not in {"heartbeat", "progress"}:
            del self.holder[taken.job_id]
        if verb == "finish":
            self.results[taken.job_id] = taken.fence

    def _write(self, session, taken: Claim, verb: str) -> None:
        error = {"code": "x", "detail": "y"}
        writes = {
            "heartbeat": lambda: service.heartbeat(session, taken),
            "progress": lambda: service.progress(session, taken, {"fence": taken.fence}),
            "finish": lambda: service.finish(session, taken, {"fence": taken.fence}),
            "fail": lambda: service.fail(session, taken, error),
            "retry": lambda: service.fail(session, taken, error, retry_in_s=0),
            "release": lambda: service.release(session, taken),
            "acknowledge_cancel": lambda: service.acknowledge_cancel(session, taken),
        }
        writes[verb]()

    def _row(self, job_id: str) -> Job:
        with self.database.read() as session:
            return service.get(session, None, job_id)

    @invariant()
    def rows_agree_with_the_model(self) -> None:
        with self.database.read() as session:
            for job in session.scalars(select(Job)):
                assert (job.state == "running") == (job.id in self.holder)
                assert (job.state == "running") == (job.lease_owner is not None)
                assert (job.state in FINAL) == (job.finished_at is not None)
                assert job.fence == self.fences.get(job.id, 0)
                assert 0 <= job.attempt <= job.max_attempts
                told = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.number)).all()
                assert [event.number for event in told] == list(range(1, job.num_events + 1))
                assert (told[-1].state, told[-1].attempt) == (job.state, job.attempt)
                assert sum(event.state in FINAL for event in told) == (job.state in FINAL)
                if job.state == "succeeded":
                    assert job.result == {"fence": self.results[job.id]}
                if job.state == "failed":
                    assert job.error is not None


JobMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestJobMachine = JobMachine.TestCase
