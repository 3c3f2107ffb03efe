"""`/audit`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from registry.audit import repository
from registry.audit.schemas import AuditEventOut
from registry.db import ReadSessionDep
from registry.errors import BadRequest, problem_responses
from registry.pagination import Cursor, Limit, Page, make_page
from registry.tenants.auth import Subject, allow

router = APIRouter(tags=["audit"])

# Whoever may hand out keys may see what they did: there is no scope of its own for reading the log.
KeyAdmin = Annotated[Subject, Depends(allow("keys:write"))]


@router.get("/audit", responses=problem_responses(BadRequest))
def list_events(
    subject: KeyAdmin,
    session: ReadSessionDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    action: Annotated[str | None, Query(max_length=64, description="Only this action, such as `key.revoked`.")] = None,
) -> Page[AuditEventOut]:
    """State changes and refusals, newest first: the tenant's; all of them for an admin who names no tenant."""
    subject.must_be_unlimited("the audit log")
    rows = repository.list_events(session, subject.tenant_id, action=action, limit=limit, cursor=cursor)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=AuditEventOut.model_validate)
