"""`/jobs`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from registry.audit.service import record
from registry.db import DatabaseDep, ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Conflict, NotFound, Unavailable, problem_responses
from registry.jobs import repository, service
from registry.jobs.events import JobWatch, is_over, stream
from registry.jobs.models import FINAL
from registry.jobs.schemas import JobEventOut, JobEvents, JobOut, JobState
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.tenants.auth import Subject, allow

router = APIRouter(tags=["jobs"], route_class=Route)

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
    rows = repository.list_jobs(session, subject, state=state, limit=limit, cursor=cursor)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=JobOut.model_validate)


@router.get("/jobs/{job_id}", responses=problem_responses(NotFound))
def get_job(job_id: str, subject: JobReader, session: ReadSessionDep) -> JobOut:
    return JobOut.model_validate(service.get_visible(session, subject, job_id))


EVENT_STREAM = "text/event-stream"
_BOTH: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events as JSON, or as server-sent events where that is accepted", "content": {EVENT_STREAM: {}}}
}
After = Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the last event seen: `after` of the answer before.")]


@router.get("/jobs/{job_id}/events", response_model=JobEvents, responses=problem_responses(BadRequest, NotFound) | _BOTH)
async def job_events(
    job_id: str,
    subject: JobReader,
    database: DatabaseDep,
    request: Request,
    *,
    after: After = 0,
    limit: Limit = 50,
    accept: Annotated[str, Header(description="`text/event-stream` for a stream that lasts until the job is over.")] = "",
    last_event_id: Annotated[str | None, Header(description="Where to go on; beats `after`.")] = None,
) -> JobEvents | Response:
    """What happened to a job, in order: a cursor to poll with, or a stream to follow. 204 ends a follower of a job that is over."""
    after = after if last_event_id is None else _event_number(last_event_id)

    def look() -> tuple[bool, list[JobEventOut]]:
        with database.read() as session:
            job, events = service.events_after(session, subject, job_id, after=after, limit=limit)
            return job.state in FINAL, [JobEventOut.model_validate(event) for event in events]

    job_is_over, events = await run_in_threadpool(look)
    ended = is_over(events) or (job_is_over and not events)
    if EVENT_STREAM not in accept:
        return JobEvents(items=events, after=events[-1].number if events else after, ended=ended)
    if ended and not events:
        return Response(status_code=204)
    return _follow(request.app.state.job_watch, job_id, events=events, seen=after)


def _follow(watch: JobWatch, job_id: str, *, events: list[JobEventOut], seen: int) -> Response:
    if watch.is_full:
        raise Unavailable(
            "this process follows as many jobs as it can", remedy="poll without `Accept: text/event-stream`, or try again", retry_after_s=2
        )
    return StreamingResponse(
        stream(watch, job_id, backlog=events, seen=seen),
        media_type=EVENT_STREAM,
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _event_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest("Last-Event-ID is not a number of an event", field="Last-Event-ID", value=text[:64], remedy="leave it out")
    return int(text)


@router.post("/jobs/{job_id}/cancel", responses=problem_responses(NotFound, Conflict))
def cancel_job(job_id: str, subject: JobWriter, session: WriteSessionDep) -> JobOut:
    """A queued job is cancelled at once, a running one soon: watch its state. 409 when it is over already."""
    before = service.get_visible(session, subject, job_id).state
    job = service.cancel(session, subject.tenant_id, job_id)
    record(
        session,
        subject,
        "job.cancel_requested",
        "job",
        job.id,
        before={"state": before},
        after={"state": job.state},
        tenant_id=job.tenant_id,
    )
    return JobOut.model_validate(job)
