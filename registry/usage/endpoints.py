"""`/usage` for tenants and operators; `/replicas/{replica_id}/usage` for replicas."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Iterable
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import JSONResponse

from registry.blobs.endpoints import SettingsDep
from registry.db import DatabaseDep, ReadSessionDep
from registry.errors import BadRequest, Conflict, Forbidden, Invalid, NotFound, problem_responses
from registry.pagination import Cursor, Limit
from registry.routing import Route
from registry.serving.endpoints import SAME_WIRE_VERSION, ReplicaKey, SignerDep
from registry.tenants.auth import Subject, allow
from registry.text import Text
from registry.usage import service
from registry.usage.schemas import Group, UsagePage, UsageRow
from registry.wire import UsageReply, UsageReport

router = APIRouter(tags=["usage"], route_class=Route)

Reader = Annotated[Subject, Depends(allow("usage:read"))]
ALL_GROUPS = (Group.DAY, Group.ADAPTER, Group.KEY)
CSV = "text/csv"


@router.post(
    "/replicas/{replica_id}/usage",
    dependencies=SAME_WIRE_VERSION,
    responses=problem_responses(Conflict, Forbidden, NotFound, Invalid),
)
def report_usage(
    replica_id: str, body: UsageReport, *, subject: ReplicaKey, database: DatabaseDep, settings: SettingsDep, signer: SignerDep
) -> UsageReply:
    """Settle finished requests, each once however often it is reported. 404: register again."""
    reported = service.read_grants(body, signer=signer, settings=settings)
    with database.write() as session:
        return service.settle(session, subject, reported, replica_id=replica_id, num_reported=len(body.requests), settings=settings)


@router.get(
    "/usage",
    response_model=UsagePage,
    responses=problem_responses(BadRequest, Forbidden, Invalid)
    | {200: {"content": {CSV: {"schema": {"type": "string"}}}, "description": "A page of JSON, or the whole range as CSV."}},
)
def get_usage(
    *,
    subject: Reader,
    session: ReadSessionDep,
    since: Annotated[dt.date | None, Query(description="First day of UTC; default: 30 days up to `until`.")] = None,
    until: Annotated[dt.date | None, Query(description="Last day, included; default: today.")] = None,
    adapter: Annotated[Text | None, Query(max_length=128, description="Only this adapter, or this base model alone.")] = None,
    key_id: Annotated[Text | None, Query(max_length=32, description="Only requests of this key.")] = None,
    group_by: Annotated[list[Group] | None, Query(description="Repeat for several; default: day, adapter and key.")] = None,
    format: Annotated[Literal["json", "csv"] | None, Query(description="Default: as `Accept` says.")] = None,
    accept: Annotated[str, Header(max_length=1024)] = "",
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """Requests and tokens by day, adapter and key, newest first: the tenant's; every tenant's for an admin who names none."""
    subject.must_be_unlimited("usage")
    groups = group_by or ALL_GROUPS
    asked = service.question(session, subject.tenant_id, since=since, until=until, adapter=adapter, key_id=key_id, groups=groups)
    if format == "csv" or (format is None and CSV in accept):
        return Response(_csv(service.everything(session, asked)), media_type=CSV)
    return JSONResponse(service.page(session, asked, cursor=cursor, limit=limit).model_dump(mode="json"))


def _csv(rows: Iterable[UsageRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(UsageRow.model_fields), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()
