"""Queries over audit events."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from registry.audit.models import AuditEvent
from registry.db import ReadSession
from registry.pagination import after_cursor


def list_events(session: ReadSession, tenant_id: str | None, *, action: str | None, limit: int, cursor: str | None) -> Sequence[AuditEvent]:
    """Newest first. `tenant_id` None lists every tenant's: for admins alone."""
    statement = select(AuditEvent)
    if tenant_id is not None:
        statement = statement.where(AuditEvent.tenant_id == tenant_id)
    if action is not None:
        statement = statement.where(AuditEvent.action == action)
    return session.scalars(after_cursor(statement, cursor, at=AuditEvent.created_at, row_id=AuditEvent.id, limit=limit)).all()
