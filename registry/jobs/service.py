"""The life of a job: enqueue and cancel for the registry, claim to finish for workers.

    queued --claim--> running --finish--> succeeded
      ^                 | | `---fail----> failed        (at once, or when attempts are used up)
      |--fail, release--' `--acknowledge_cancel--> cancelled
      `--lease ran out: the next claim takes it under a higher fence, or sweep fails it when attempts are used up

A worker holds a `Claim`. Whatever it writes carries the claim's fence, in the same transaction as its other writes:
when the lease was lost and the job claimed again, StaleFence rolls them all back.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from registry.db import ReadSession, WriteSession, database_time
from registry.errors import Conflict, NotFound
from registry.jobs import repository
from registry.jobs.models import CANCELLED, FAILED, FINAL, QUEUED, RUNNING, SUCCEEDED, Job

DEFAULT_MAX_ATTEMPTS = 5

VALIDATE_VERSION = "validate_version"
IMPORT_BASE_MODEL = "import_base_model"


class StaleFence(Conflict):
    """This worker lost the job: its lease ran out and another claimed it, or the job is over. Stop, write nothing."""

    code = "stale_fence"


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
) -> Job:
    """Add a job to the caller's transaction, so that it exists exactly when what it is about does."""
    job = Job(
        id=uuid4().hex,
        kind=kind,
        tenant_id=tenant_id,
        subject_id=subject_id,
        payload=dict(payload),
        max_attempts=DEFAULT_MAX_ATTEMPTS if max_attempts is None else max_attempts,
    )
    session.add(job)
    session.flush()
    return job


def get(session: ReadSession, tenant_id: str | None, job_id: str) -> Job:
    job = repository.find(session, tenant_id, job_id)
    if job is None:
        raise NotFound(f"job {job_id!r} does not exist", field="id", value=job_id, remedy="see `GET /api/v1/jobs`")
    return job


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
    if not repository.transition(session, job_id=job.id, fence=job.fence, state_before=job.state, values=changes):
        raise Conflict(f"job {job_id} changed meanwhile", field="state", value=job.state, remedy="ask again")
    return get(session, tenant_id, job_id)


def claim(session: WriteSession, *, owner: str, kinds: Collection[str], lease_s: float) -> Claim | None:
    """Take the job that has waited longest, or None. The transaction must commit before the work begins."""
    sweep(session)
    while (job := repository.next_claimable(session, kinds)) is not None:
        expires_at = database_time(session) + dt.timedelta(seconds=lease_s)
        taken = repository.transition(
            session,
            job_id=job.id,
            fence=job.fence,
            state_before=job.state,
            values={
                "state": RUNNING,
                "fence": job.fence + 1,
                "attempt": job.attempt + 1,
                "lease_owner": owner,
                "lease_expires_at": expires_at,
            },
        )
        if taken:
            return _claim_of(job, owner=owner, lease_s=lease_s)
    return None


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
    )


def heartbeat(session: WriteSession, claim: Claim) -> Pulse:
    """Move the end of the lease. Raises StaleFence."""
    expires_at = database_time(session) + dt.timedelta(seconds=claim.lease_s)
    _advance(session, claim, lease_expires_at=expires_at)
    return Pulse(cancel_requested=repository.lock(session, claim.job_id).cancel_requested, lease_expires_at=expires_at)


def progress(session: WriteSession, claim: Claim, values: Mapping[str, Any]) -> None:
    """Replace what `GET /jobs/{id}` shows as progress. Raises StaleFence."""
    _advance(session, claim, progress=dict(values))


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


def release(session: WriteSession, claim: Claim) -> None:
    """Give the job back untried (a worker that drains): the attempt does not count. Raises StaleFence."""
    _leave(session, claim, state=QUEUED, attempt=claim.attempt - 1)


def acknowledge_cancel(session: WriteSession, claim: Claim) -> None:
    """cancelled: the worker has stopped what a heartbeat told it to stop. Raises StaleFence."""
    _leave(session, claim, state=CANCELLED)


def sweep(session: WriteSession) -> list[Job]:
    """End the jobs whose worker is gone and which may not be claimed again; returns them."""
    swept = []
    for job in repository.abandoned(session):
        if job.cancel_requested:
            changes: dict[str, Any] = {"state": CANCELLED}
        else:
            detail = f"its worker stopped answering in attempt {job.attempt} of {job.max_attempts}"
            changes = {"state": FAILED, "error": {"code": "worker_lost", "detail": detail}}
        changes |= _no_lease() | {"finished_at": database_time(session)}
        if repository.transition(session, job_id=job.id, fence=job.fence, state_before=RUNNING, values=changes):
            swept.append(get(session, None, job.id))
    return swept


def _no_lease() -> dict[str, Any]:
    return {"lease_owner": None, "lease_expires_at": None}


def _leave(session: WriteSession, claim: Claim, *, state: str, **values: Any) -> str:
    """running -> `state`, which is returned; a job that was cancelled meanwhile does not go back to the queue."""
    if state == QUEUED and repository.lock(session, claim.job_id).cancel_requested:
        state = CANCELLED
    if state in FINAL:
        values["finished_at"] = database_time(session)
    _advance(session, claim, state=state, **_no_lease(), **values)
    return state


def _advance(session: WriteSession, claim: Claim, **values: Any) -> None:
    if not repository.transition(session, job_id=claim.job_id, fence=claim.fence, state_before=RUNNING, values=values):
        raise StaleFence(f"job {claim.job_id} is no longer held under fence {claim.fence}", field="fence", value=claim.fence)
