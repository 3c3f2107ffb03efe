"""`/audit`."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, AwareDatetime

from registry.audit import repository, service
from registry.audit.repository import Wanted
from registry.audit.schemas import AuditEventOut, Outcome
from registry.db import DatabaseDep, ReadSessionDep
from registry.errors import BadRequest, Forbidden, Invalid, NotFound, problem_responses
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.tenants.auth import Subject, allow
from registry.text import Text

router = APIRouter(tags=["audit"], route_class=Route)

# Whoever may hand out keys may see what they did; `audit:read` is for whoever should do no more than read.
Auditor = Annotated[Subject, Depends(allow("audit:read", "keys:write"))]

JSON_LINES = "application/x-ndjson"
_LINES: dict[int | str, dict[str, Any]] = {200: {"description": "One event a line, oldest first", "content": {JSON_LINES: {}}}}


def _of_our_time(moment: dt.datetime) -> dt.datetime:
    if not 1970 < moment.year < 9000:
        raise ValueError("a moment between 1971 and 8999")
    return moment


Moment = Annotated[AwareDatetime, AfterValidator(_of_our_time)]


def _wanted(
    *,
    actor: Annotated[Text | None, Query(max_length=32, description="Only changes by this key.")] = None,
    action: Annotated[Text | None, Query(max_length=64, description="Only this action, such as `key.revoked`.")] = None,
    resource_type: Annotated[Text | None, Query(max_length=32, description="Only of this sort, such as `adapter`.")] = None,
    resource_id: Annotated[Text | None, Query(max_length=256, description="Only about the thing with this id.")] = None,
    outcome: Annotated[Outcome | None, Query(description="Only changes, or only refused requests.")] = None,
    since: Annotated[Moment | None, Query(description="Not before, with a time zone.")] = None,
    until: Annotated[Moment | None, Query(description="Before, with a time zone.")] = None,
) -> Wanted:
    return Wanted(
        key_id=actor, action=action, resource_type=resource_type, resource_id=resource_id, outcome=outcome, since=since, until=until
    )


WantedDep = Annotated[Wanted, Depends(_wanted)]


@router.get("/audit", responses=problem_responses(BadRequest, Forbidden, Invalid))
def list_events(
    subject: Auditor, session: ReadSessionDep, wanted: WantedDep, limit: Limit = 50, cursor: Cursor = None
) -> Page[AuditEventOut]:
    """State changes and refusals, newest first: the tenant's; all of them for an admin who names no tenant."""
    subject.must_be_unlimited("the audit log")
    rows = repository.list_events(session, subject.tenant_id, wanted, limit=limit, cursor=cursor)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=AuditEventOut.model_validate)


@router.get(
    "/audit/export",
    response_class=StreamingResponse,
    responses=problem_responses(BadRequest, Forbidden, Invalid, NotFound) | _LINES,
)
def export_events(
    subject: Auditor,
    database: DatabaseDep,
    wanted: WantedDep,
    after: Annotated[Text | None, Query(max_length=32, description="Go on behind the event with this id.")] = None,
) -> StreamingResponse:
    """The whole log, or the chosen part of it, as JSON Lines, oldest first. A broken stream goes on with `after`.

    Events appear when their transaction commits, up to a minute after their time: who follows the log sets `until` to a
    minute ago.
    """
    subject.must_be_unlimited("the audit log")
    lines = service.export(database, subject.tenant_id, wanted, after=after)
    return StreamingResponse(lines, media_type=JSON_LINES, headers={"Cache-Control": "no-store"})
