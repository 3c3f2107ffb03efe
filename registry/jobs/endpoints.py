"""`/jobs`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from registry.audit.service import record
from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Conflict, NotFound, problem_responses
from registry.jobs import repository, service
from registry.jobs.schemas import JobOut, JobState
from registry.pagination import Cursor, Limit, Page, make_page
from registry.tenants.auth import Subject, allow

router = APIRouter(tags=["jobs"])

JobReader = Annotated[Subject, Depends(allow("jobs:read"))]
JobWriter = Annotated[Subject, Depends(allow("jobs:write"))]


@router.get("/jobs", responses=problem_responses(BadRequest))
def list_jobs(
    subject: JobReader,
    session: ReadSessionDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
) -> Page[JobOut]:
    """The tenant's jobs, newest first; all of them for an admin who names no tenant."""
    rows = repository.list_jobs(session, subject.tenant_id, state=state, limit=limit, cursor=cursor)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=JobOut.model_validate)


@router.get("/jobs/{job_id}", responses=problem_responses(NotFound))
def get_job(job_id: str, subject: JobReader, session: ReadSessionDep) -> JobOut:
    return JobOut.model_validate(service.get(session, subject.tenant_id, job_id))


@router.post("/jobs/{job_id}/cancel", responses=problem_responses(NotFound, Conflict))
def cancel_job(job_id: str, subject: JobWriter, session: WriteSessionDep) -> JobOut:
    """A queued job is cancelled at once, a running one soon: watch its state. 409 when it is over already."""
    job = service.cancel(session, subject.tenant_id, job_id)
    record(session, subject, "job.cancel_requested", "job", job.id, after={"state": job.state}, tenant_id=job.tenant_id)
    return JobOut.model_validate(job)
