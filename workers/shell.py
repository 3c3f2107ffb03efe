"""The job shell: claim -> run -> publish, under a lease that a heartbeat thread renews.

A kind of job computes without any transaction open and returns what to publish; the shell writes that and the end of
the job in one transaction, conditional on the fence. So a worker may die, stall or be partitioned at any moment:
either everything of an attempt is there, once, or nothing is.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import structlog
from opentelemetry.trace import Span, SpanKind
from sqlalchemy.exc import SQLAlchemyError

from registry import metrics, tracing
from registry.db import Database, WriteSession, reaching_tenant
from registry.jobs import service as jobs
from registry.jobs.service import Claim, StaleFence
from workers.sweep import GiveUp, Sweeper

log = structlog.get_logger(__name__)

MAX_BACKOFF_S = 60.0
HEARTBEATS_A_LEASE = 3
LOOK_S = 1.0
"""How soon a running job hears of its cancellation or of a drain that has lasted too long."""

Publish = Callable[[WriteSession], Mapping[str, Any]]


class CancelledByRequest(Exception):
    """Somebody cancelled the job; its run stops at the next `Attempt.check`."""


class Draining(Exception):
    """The worker must end, and the job did not in the time that it had; its run stops at the next `Attempt.check`."""


class GivesWay(Exception):
    """A long job has worked for its slice of time and kept how far it is: other jobs go first, then it goes on."""


class Attempt:
    """What a running job sees of the world: whether it should still run."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.lost = threading.Event()
        self.draining = threading.Event()

    def check(self) -> None:
        """Call it every second or so of work.

        Raises StaleFence where the lease was lost, CancelledByRequest, or Draining where the worker must end.
        """
        if self.lost.is_set():
            raise StaleFence("the lease of this job was lost", field="fence")
        if self.cancelled.is_set():
            raise CancelledByRequest
        if self.draining.is_set():
            raise Draining


@dataclass(frozen=True)
class JobKind:
    """How one kind of job is done.

    `run` computes and returns the writes to publish. `give_up` writes what an owner must see when the job ends
    without a result: a resource must not stay pending for ever. It gets the payload, a code and a sentence.
    """

    run: Callable[[Claim, Attempt], Publish]
    give_up: GiveUp


class Worker:
    """Runs one job at a time, found by polling or named by a hint. Any number of workers share a database."""

    def __init__(
        self,
        database: Database,
        *,
        kinds: Mapping[str, JobKind],
        lease_s: float,
        poll_s: float,
        drain_s: float = 15.0,
        max_running: int = 0,
    ) -> None:
        self._database = database
        self._kinds = kinds
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._drain_s = drain_s
        self._max_running = max_running
        self._stop = threading.Event()
        self._hands = threading.Lock()  # held while a job is in them
        self._sweeper = Sweeper(database, give_up={kind: how.give_up for kind, how in kinds.items()})
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set; the job in hand is finished or given back. A database that is away is waited for."""
        self._stop = stop
        log.info("worker.started", owner=self.owner, kinds=sorted(self._kinds))
        while not stop.is_set():
            try:
                worked = self.run_one()
            except SQLAlchemyError as error:
                log.warning("worker.database_away", error=str(error))
                worked = False
            if not worked:
                stop.wait(self._poll_s)
        log.info("worker.stopped", owner=self.owner)

    def run_one(self) -> bool:
        """Claim the job that goes next and bring it to an end. False where there is none, or our hands are full."""
        if not self._hands.acquire(blocking=False):
            return False
        try:
            self._sweeper.sweep()
            return self._claim_and_run(None)
        finally:
            self._hands.release()

    def run_hinted(self, job_id: str, *, traceparent: str | None = None) -> bool:
        """The same for one job, once our hands are free. False where it may not be claimed: a hint decides nothing.

        `traceparent` is the message's; without one the job's own row says which trace it belongs to.
        """
        with self._hands:
            return not self._stop.is_set() and self._claim_and_run(job_id, traceparent=traceparent)

    def _claim_and_run(self, job_id: str | None, *, traceparent: str | None = None) -> bool:
        claim = self._claim(job_id)
        metrics.claims.labels("poll" if job_id is None else "hint", "none" if claim is None else "claimed").inc()
        if claim is None:
            return False
        said = structlog.contextvars.bound_contextvars(job_id=claim.job_id, kind=claim.kind, attempt=claim.attempt)
        with said, _job_span(claim, parent=traceparent or claim.traceparent), reaching_tenant(claim.tenant_id):
            log.info("job.claimed", fence=claim.fence)
            with self._heartbeat(claim) as attempt:
                self._attempt(claim, attempt)
        return True

    def _claim(self, job_id: str | None) -> Claim | None:
        with self._database.system_write() as session:
            return jobs.claim(
                session, owner=self.owner, kinds=list(self._kinds), lease_s=self._lease_s, job_id=job_id, max_running=self._max_running
            )

    def _attempt(self, claim: Claim, attempt: Attempt) -> None:
        started, outcome = time.monotonic(), "interrupted"
        try:
            with metrics.jobs_in_hand.track_inprogress():
                outcome = self._bring_to_an_end(claim, attempt)
        except StaleFence:  # whichever way it ended: another worker has it now
            outcome = "lost"
            metrics.leases_lost.inc()
            log.warning("job.lost")
        finally:
            tracing.end_job(outcome)
            metrics.jobs_run.labels(claim.kind, outcome).inc()
            metrics.job_seconds.labels(claim.kind).observe(time.monotonic() - started)

    def _bring_to_an_end(self, claim: Claim, attempt: Attempt) -> str:
        """How it ended, for the metrics."""
        try:
            publish = self._kinds[claim.kind].run(claim, attempt)
            return self._finish(claim, publish)
        except StaleFence:
            raise
        except CancelledByRequest:
            return self._acknowledge_cancel(claim)
        except Draining:
            return self._release(claim, gives_way=False)
        except GivesWay:
            return self._release(claim, gives_way=True)
        except Exception as error:  # noqa: BLE001 - the loop edge: one job's failure is not the worker's
            return self._fail(claim, error)

    def _finish(self, claim: Claim, publish: Publish) -> str:
        with self._database.write() as session:
            result = publish(session)
            jobs.finish(session, claim, result)
        log.info("job.finished", **result)
        return "finished"

    def _acknowledge_cancel(self, claim: Claim) -> str:
        with self._database.write() as session:
            self._kinds[claim.kind].give_up(session, claim.tenant_id, claim.payload, "cancelled", "the job was cancelled")
            jobs.acknowledge_cancel(session, claim)
        log.info("job.cancelled")
        return "cancelled"

    def _release(self, claim: Claim, *, gives_way: bool) -> str:
        with self._database.write() as session:
            jobs.release(session, claim, gives_way=gives_way)
        log.info("job.released")
        return "released"

    def _fail(self, claim: Claim, error: Exception) -> str:
        log.error("job.failed", exc_info=error)
        detail = f"{type(error).__name__}: {error}"[:500]
        with self._database.write() as session:
            again = jobs.fail(session, claim, {"code": "internal", "detail": detail}, retry_in_s=backoff_s(claim.attempt))
            if not again:
                self._kinds[claim.kind].give_up(session, claim.tenant_id, claim.payload, "internal", detail)
        return "retried" if again else "failed"

    @contextmanager
    def _heartbeat(self, claim: Claim) -> Iterator[Attempt]:
        attempt, over = Attempt(), threading.Event()
        thread = threading.Thread(target=self._beat, args=(claim, attempt, over), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield attempt
        finally:
            over.set()
            thread.join()

    def _beat(self, claim: Claim, attempt: Attempt, over: threading.Event) -> None:
        every_s = self._lease_s / HEARTBEATS_A_LEASE
        renew_at, drained_at = time.monotonic() + every_s, float("inf")
        while not over.wait(min(every_s, LOOK_S)) and not attempt.lost.is_set():
            now = time.monotonic()
            if self._stop.is_set():
                drained_at = min(drained_at, now + self._drain_s)
            if now >= drained_at:
                attempt.draining.set()
            renew = now >= renew_at
            if renew:
                renew_at = now + every_s
            self._look(claim, attempt, renew=renew)

    def _look(self, claim: Claim, attempt: Attempt, *, renew: bool) -> None:
        """Hear of a cancellation, and move the end of the lease where it is time to."""
        try:
            with reaching_tenant(claim.tenant_id):  # said again: another thread
                cancelled = self._cancel_requested(claim, renew=renew)
            if cancelled:
                attempt.cancelled.set()
        except StaleFence:
            attempt.lost.set()
        except SQLAlchemyError as error:
            metrics.heartbeats_missed.inc()
            log.warning("job.heartbeat_missed", error=str(error))

    def _cancel_requested(self, claim: Claim, *, renew: bool) -> bool:
        if renew:
            with self._database.write() as session:
                return jobs.heartbeat(session, claim).cancel_requested
        with self._database.read() as session:
            return jobs.is_cancel_requested(session, claim)


def _job_span(claim: Claim, *, parent: str | None) -> AbstractContextManager[Span]:
    attributes: dict[str, str | int | None] = {
        "lorary.job.id": claim.job_id,
        "lorary.job.kind": claim.kind,
        "lorary.job.attempt": claim.attempt,
        "lorary.tenant.id": claim.tenant_id,
    }
    return tracing.span(f"job {claim.kind}", kind=SpanKind.CONSUMER, attributes=attributes, parent=parent)


def backoff_s(attempt: int) -> float:
    """1, 2, 4 ... seconds with a fifth of jitter, so that jobs that failed together do not return together."""
    pause_s = min(MAX_BACKOFF_S, 2.0 ** (attempt - 1))
    return pause_s * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, not a secret
