"""`/gc`: start a collection, or count what one would remove. For operators alone."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Forbidden, Invalid, NotFound, problem_responses
from registry.gc import repository, service
from registry.gc.schemas import CollectionIn, CollectionOut
from registry.jobs.models import Job
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.tenants.auth import Subject, allow
from registry.tenants.keys import ADMIN

router = APIRouter(prefix="/gc", tags=["gc"], route_class=Route)

Admin = Annotated[Subject, Depends(allow(ADMIN))]


@router.post(
    "",
    status_code=202,
    responses=problem_responses(BadRequest, Forbidden, Invalid) | {200: {"description": "One is under way.", "model": CollectionOut}},
)
def start_collection(wanted: CollectionIn, *, subject: Admin, session: WriteSessionDep, response: Response) -> CollectionOut:
    """Collect garbage as a job, or count it (`dry_run`)."""
    job, created = service.start(session, subject, dry_run=wanted.dry_run)
    response.status_code = 202 if created else 200
    response.headers["Location"] = f"/api/v1/gc/{job.id}"
    return _show(job)


@router.get("", responses=problem_responses(BadRequest, Forbidden, Invalid), dependencies=[Depends(allow(ADMIN))])
def list_collections(session: ReadSessionDep, cursor: Cursor = None, limit: Limit = 50) -> Page[CollectionOut]:
    """Newest first."""
    rows = repository.collections_page(session, cursor=cursor, limit=limit)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=_show)


@router.get("/{job_id}", responses=problem_responses(Forbidden, NotFound), dependencies=[Depends(allow(ADMIN))])
def get_collection(job_id: str, session: ReadSessionDep) -> CollectionOut:
    job = repository.collection(session, job_id)
    if job is None:
        raise NotFound(f"collection {job_id!r} does not exist", field="job_id", value=job_id, remedy="see `GET /api/v1/gc`")
    return _show(job)


def _show(job: Job) -> CollectionOut:
    return CollectionOut(
        job_id=job.id,
        state=job.state,
        dry_run=bool(job.payload.get("dry_run")),
        report=job.result or (job.progress and service.progress_of(job).report()),
        error=job.error,
        created_at=job.created_at,
        finished_at=job.finished_at,
    )
