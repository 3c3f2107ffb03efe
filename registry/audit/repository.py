"""Queries over audit events. `tenant_id` None means every tenant's: for admins alone."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, literal, select, tuple_

from registry.audit.models import AuditEvent
from registry.db import ReadSession, UtcDateTime
from registry.pagination import after_cursor


@dataclass(frozen=True)
class Wanted:
    """Which events; None stands for any. `since` is inside, `until` is not."""

    key_id: str | None = None
    action: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    outcome: str | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


def list_events(session: ReadSession, tenant_id: str | None, wanted: Wanted, *, limit: int, cursor: str | None) -> Sequence[AuditEvent]:
    """Newest first, one more than `limit`."""
    statement = after_cursor(_chosen(tenant_id, wanted), cursor, at=AuditEvent.created_at, row_id=AuditEvent.id, limit=limit)
    return session.scalars(statement).all()


def events_after(
    session: ReadSession, tenant_id: str | None, wanted: Wanted, *, after: AuditEvent | None, limit: int
) -> Sequence[AuditEvent]:
    """Oldest first, those behind `after`."""
    statement = _chosen(tenant_id, wanted)
    if after is not None:
        seen = tuple_(literal(after.created_at, UtcDateTime()), literal(after.id))
        statement = statement.where(tuple_(AuditEvent.created_at, AuditEvent.id) > seen)
    return session.scalars(statement.order_by(AuditEvent.created_at, AuditEvent.id).limit(limit)).all()


def find(session: ReadSession, tenant_id: str | None, event_id: str) -> AuditEvent | None:
    return session.scalar(_chosen(tenant_id, Wanted()).where(AuditEvent.id == event_id))


def _chosen(tenant_id: str | None, wanted: Wanted) -> Select[AuditEvent]:
    statement = select(AuditEvent)
    if tenant_id is not None:
        statement = statement.where(AuditEvent.tenant_id == tenant_id)
    for name in ("key_id", "action", "resource_type", "resource_id", "outcome"):
        value = getattr(wanted, name)
        if value is not None:
            statement = statement.where(getattr(AuditEvent, name) == value)
    if wanted.since is not None:
        statement = statement.where(AuditEvent.created_at >= wanted.since)
    if wanted.until is not None:
        statement = statement.where(AuditEvent.created_at < wanted.until)
    return statement
