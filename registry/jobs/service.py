"""The life of a job: enqueue and cancel for the registry, claim to finish for workers.

    queued --claim--> running --finish--> succeeded
      ^                 | | `---fail----> failed        (at once, or when attempts are used up)
      |--fail, release--' `--acknowledge_cancel--> cancelled
      `--lease ran out: sweep queues it again, or the next claim takes it, both under a higher fence;
         sweep fails it when its attempts are used up

Each of these writes an event (`registry.jobs.events`) and, where a broker is configured and the job is queued, a hint
for the relay (`registry.jobs.outbox`), in the same transaction.

A worker holds a `Claim`. Whatever it writes carries the claim's fence, in the same transaction as its other writes:
when the lease was lost and the job claimed again, StaleFence rolls them all back.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from registry.db import ReadSession, WriteSession, database_time
from registry.errors import Conflict, NotFound
from registry.inserts import insert_together
from registry.jobs import outbox, repository
from registry.jobs.models import CANCELLED, DEFAULT_QUEUE, FAILED, FINAL, PROGRESS, QUEUED, RUNNING, STATE, SUCCEEDED, Job, JobEvent
from registry.quotas import repository as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import measure
from registry.tenants.auth import Subject
from registry.tracing import current_traceparent

DEFAULT_MAX_ATTEMPTS = 5

VALIDATE_VERSION = "validate_version"
IMPORT_BASE_MODEL = "import_base_model"
FINALISE_UPLOAD = "finalise_upload"
IMPORT_HUB = "import_hub"
COLLECT_GARBAGE = "collect_garbage"
KINDS = frozenset({VALIDATE_VERSION, IMPORT_BASE_MODEL, FINALISE_UPLOAD, IMPORT_HUB, COLLECT_GARBAGE})
"""Every kind there is, for labels of metrics and spans."""

QUEUES: Mapping[str, str] = {}
"""Kind of job -> queue, for those that need another machine than `cpu`: workers can be split by queue."""
PRIORITIES: Mapping[str, int] = {VALIDATE_VERSION: 5, FINALISE_UPLOAD: 5}
"""Kind of job -> priority, 0 to 9, where it is not 0: somebody waits in front of a push."""


measure(Measure.JOBS, repository.num_running)


def queue_of(kind: str) -> str:
    return QUEUES.get(kind, DEFAULT_QUEUE)


class StaleFence(Conflict):
    """This worker lost the job: its lease ran out and another claimed it, or the job is over. Stop, write nothing."""

    code = "stale_fence"


class _PassedOver(Exception):
    """Undoes a claim's step, and so lets the tenant's quota row go: who holds one while it waits for another's meets who holds
    them the other way round.
    """


@dataclass(frozen=True)
class Claim:
    """A worker's hold on one attempt of one job, good until the lease ends or a heartbeat moves its end."""

    job_id: str
    kind: str
    tenant_id: str | None
    subject_id: str
    payload: Mapping[str, Any]
    owner: str
    fence: int
    attempt: int
    max_attempts: int
    lease_s: float
    traceparent: str | None = None


@dataclass(frozen=True)
class Pulse:
    """What a heartbeat learns."""

    cancel_requested: bool
    lease_expires_at: dt.datetime


def enqueue(
    session: WriteSession,
    *,
    kind: str,
    tenant_id: str | None,
    subject_id: str,
    payload: Mapping[str, Any],
    max_attempts: int | None = None,
    priority: int | None = None,
    adapter: str | None = None,
) -> Job:
    """Add a job to the caller's transaction, so that it exists exactly when what it is about does."""
    job_id = submit(
        session,
        kind=kind,
        tenant_id=tenant_id,
        subject_id=subject_id,
        payload=payload,
        max_attempts=max_attempts,
        priority=priority,
        adapter=adapter,
    )
    return get(session, tenant_id, job_id)


def submit(
    session: WriteSession,
    *,
    kind: str,
    tenant_id: str | None,
    subject_id: str,
    payload: Mapping[str, Any],
    max_attempts: int | None = None,
    priority: int | None = None,
    adapter: str | None = None,
) -> str:
    """`enqueue` for who needs the job's id alone. The job, its first event and its hint are one statement on PostgreSQL."""
    job: dict[str, Any] = {
        "id": uuid4().hex,
        "kind": kind,
        "queue": queue_of(kind),
        "priority": PRIORITIES.get(kind, 0) if priority is None else priority,
        "num_events": 1,
        "tenant_id": tenant_id,
        "subject_id": subject_id,
        "adapter": adapter,
        "traceparent": current_traceparent(),
        "payload": dict(payload),
        "max_attempts": DEFAULT_MAX_ATTEMPTS if max_attempts is None else max_attempts,
    }
    event = {"job_id": job["id"], "tenant_id": tenant_id, "number": 1, "type": STATE, "state": QUEUED, "attempt": 0}
    insert_together(session, {Job: job, JobEvent: event, **outbox.hint_of(session, job)})
    return str(job["id"])


def get(session: ReadSession, tenant_id: str | None, job_id: str) -> Job:
    return _found(repository.find(session, tenant_id, job_id), job_id)


def get_visible(session: ReadSession, subject: Subject, job_id: str) -> Job:
    """Raises NotFound, the same for an absent job and for one about an adapter that the key is kept from."""
    return _found(repository.find(session, subject.tenant_id, job_id, visible=repository.visible_to(subject)), job_id)


def _found(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise NotFound(f"job {job_id!r} does not exist", field="id", value=job_id, remedy="see `GET /api/v1/jobs`")
    return job


def events_after(session: ReadSession, subject: Subject, job_id: str, *, after: int, limit: int) -> tuple[Job, Sequence[JobEvent]]:
    """The job and what happened to it after event `after`, at most `limit` events."""
    job = get_visible(session, subject, job_id)
    return job, repository.events_after(session, job_id, number=after, limit=limit)


def cancel(session: WriteSession, tenant_id: str | None, job_id: str) -> Job:
    """A queued job is cancelled at once; a running one when its worker's next heartbeat hears of it.

    Idempotent. Raises Conflict for a job that succeeded or failed already.
    """
    job = get(session, tenant_id, job_id)
    if job.state in {SUCCEEDED, FAILED}:
        raise Conflict(f"job {job_id} has {job.state} already", field="state", value=job.state, remedy="nothing is left to cancel")
    if job.state == CANCELLED or job.cancel_requested:
        return job
    changes: dict[str, Any] = {"cancel_requested": True}
    if job.state == QUEUED:
        changes |= {"state": CANCELLED, "finished_at": database_time(session)}
    if not repository.transition(session, job_id=job.id, fence=job.fence, state_before=job.state, values=changes, event=STATE):
        raise Conflict(f"job {job_id} changed meanwhile", field="state", value=job.state, remedy="ask again")
    return get(session, tenant_id, job_id)


def claim(
    session: WriteSession, *, owner: str, kinds: Collection[str], lease_s: float, job_id: str | None = None, max_running: int = 0
) -> Claim | None:
    """Take the job that goes next, or the one named `job_id` if it may be claimed. None: there is nothing to do.

    A tenant runs at most what its quota says at a time, or `max_running` (0: any number) where that says nothing. The
    transaction must commit before the work begins.
    """
    passed_over: set[str] = set()
    while True:
        found = repository.next_claimable(session, kinds=kinds, job_id=job_id, max_running=max_running, passed_over=passed_over)
        if found is None:
            return None
        passed_over.add(found.id)
        with suppress(_PassedOver), session.begin_nested():
            if found.tenant_id is not None:
                quotas.lock(session, found.tenant_id)  # before the job's row, as everybody who takes both
            job = repository.lock_claimable(session, found.id, kinds=kinds, max_running=max_running)
            if job is not None and _take(session, job, owner=owner, lease_s=lease_s):
                return _claim_of(job, owner=owner, lease_s=lease_s)
            raise _PassedOver


def _take(session: WriteSession, job: Job, *, owner: str, lease_s: float) -> bool:
    values = {
        "state": RUNNING,
        "fence": job.fence + 1,
        "attempt": job.attempt + 1,
        "lease_owner": owner,
        "lease_expires_at": database_time(session) + dt.timedelta(seconds=lease_s),
    }
    return repository.transition(session, job_id=job.id, fence=job.fence, state_before=job.state, values=values, event=STATE)


def _claim_of(job: Job, *, owner: str, lease_s: float) -> Claim:
    return Claim(
        job_id=job.id,
        kind=job.kind,
        tenant_id=job.tenant_id,
        subject_id=job.subject_id,
        payload=job.payload,
        owner=owner,
        fence=job.fence + 1,
        attempt=job.attempt + 1,
        max_attempts=job.max_attempts,
        lease_s=lease_s,
        traceparent=job.traceparent,
    )


def heartbeat(session: WriteSession, claim: Claim) -> Pulse:
    """Move the end of the lease. Raises StaleFence."""
    expires_at = database_time(session) + dt.timedelta(seconds=claim.lease_s)
    _advance(session, claim, None, lease_expires_at=expires_at)
    return Pulse(cancel_requested=repository.lock(session, claim.job_id).cancel_requested, lease_expires_at=expires_at)


def is_cancel_requested(session: ReadSession, claim: Claim) -> bool:
    """What the next heartbeat would learn of a cancellation, for less."""
    return repository.is_cancel_requested(session, claim.job_id)


def progress(session: WriteSession, claim: Claim, values: Mapping[str, Any]) -> None:
    """Replace what `GET /jobs/{id}` shows as progress. Raises StaleFence."""
    _advance(session, claim, PROGRESS, progress=dict(values))


def finish(session: WriteSession, claim: Claim, result: Mapping[str, Any] | None = None) -> None:
    """succeeded; a cancellation that came too late is ignored. Raises StaleFence."""
    _leave(session, claim, state=SUCCEEDED, result=dict(result or {}), error=None)


def fail(session: WriteSession, claim: Claim, error: Mapping[str, Any], retry_in_s: float | None = None) -> bool:
    """failed with `error` {code, detail}, or queued again in `retry_in_s` while attempts are left.

    True: it will be tried again. Raises StaleFence.
    """
    if retry_in_s is None or claim.attempt >= claim.max_attempts:
        _leave(session, claim, state=FAILED, error=dict(error))
        return False
    available_at = database_time(session) + dt.timedelta(seconds=retry_in_s)
    return _leave(session, claim, state=QUEUED, error=dict(error), available_at=available_at) == QUEUED


def release(session: WriteSession, claim: Claim, *, gives_way: bool = False) -> None:
    """Give the job back untried (a worker that drains): the attempt does not count. Raises StaleFence.

    `gives_way`: a long job that lets others go first waits from now on, like a new one.
    """
    waits = {"available_at": database_time(session)} if gives_way else {}
    _leave(session, claim, state=QUEUED, attempt=claim.attempt - 1, **waits)


def acknowledge_cancel(session: WriteSession, claim: Claim) -> None:
    """cancelled: the worker has stopped what a heartbeat told it to stop. Raises StaleFence."""
    _leave(session, claim, state=CANCELLED)


def is_any_lost(session: ReadSession, *, kinds: Collection[str]) -> bool:
    return repository.is_any_lost(session, kinds)


def sweep(session: WriteSession, *, kinds: Collection[str] | None = None) -> list[Job]:
    """Jobs whose worker is gone: queue them again while attempts are left, else end them. Returns those that ended.

    The lease that ran out was pause enough before the next attempt.
    """
    swept = []
    for job in repository.lost(session, kinds):
        changes = _after_loss(session, job)
        if not repository.transition(session, job_id=job.id, fence=job.fence, state_before=RUNNING, values=changes, event=STATE):
            continue
        after = get(session, None, job.id)
        if after.state in FINAL:
            swept.append(after)
        else:
            outbox.post(session, after)
    return swept


def _after_loss(session: WriteSession, job: Job) -> dict[str, Any]:
    now = database_time(session)
    error = {"code": "worker_lost", "detail": f"its worker stopped answering in attempt {job.attempt} of {job.max_attempts}"}
    if job.cancel_requested:
        return _no_lease() | {"state": CANCELLED, "finished_at": now}
    if job.attempt >= job.max_attempts:
        return _no_lease() | {"state": FAILED, "finished_at": now, "error": error}
    return _no_lease() | {"state": QUEUED, "available_at": now, "error": error}


def _no_lease() -> dict[str, Any]:
    return {"lease_owner": None, "lease_expires_at": None}


def _leave(session: WriteSession, claim: Claim, *, state: str, **values: Any) -> str:
    """running -> `state`, which is returned; a job that was cancelled meanwhile does not go back to the queue."""
    if state == QUEUED and repository.lock(session, claim.job_id).cancel_requested:
        state = CANCELLED
    if state in FINAL:
        values["finished_at"] = database_time(session)
    _advance(session, claim, STATE, state=state, **_no_lease(), **values)
    if state == QUEUED:
        outbox.post(session, get(session, None, claim.job_id))
    return state


def _advance(session: WriteSession, claim: Claim, event: str | None, **values: Any) -> None:
    if not repository.transition(session, job_id=claim.job_id, fence=claim.fence, state_before=RUNNING, values=values, event=event):
        raise StaleFence(f"job {claim.job_id} is no longer held under fence {claim.fence}", field="fence", value=claim.fence)
