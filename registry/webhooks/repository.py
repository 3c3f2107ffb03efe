"""Queries over webhooks. The claim and what follows it cross tenants: they belong to the deliverer alone."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import aliased, joinedload

from registry.db import ReadSession, WriteSession, database_time, utc_now
from registry.pagination import after_cursor
from registry.tenants.models import Tenant
from registry.webhooks.models import PENDING, WebhookDelivery, WebhookEndpoint, WebhookEvent


def find(session: ReadSession, tenant_id: str, endpoint_id: str) -> WebhookEndpoint | None:
    return session.scalar(select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.id == endpoint_id))


def endpoints(session: ReadSession, tenant_id: str) -> Sequence[WebhookEndpoint]:
    """Newest first; there are few (`service.MAX_ENDPOINTS`)."""
    statement = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    return session.scalars(statement.order_by(WebhookEndpoint.created_at.desc(), WebhookEndpoint.id)).all()


def has_enabled(tenant_id: str) -> ColumnElement[bool]:
    """To be asked along with something else."""
    return exists().where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.enabled)


def count(session: ReadSession, tenant_id: str) -> int:
    return session.scalar(select(func.count()).select_from(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)) or 0


def everyones(session: ReadSession) -> Sequence[WebhookEndpoint]:
    """Of all tenants: for the operator, who checks and re-seals."""
    return session.scalars(select(WebhookEndpoint).order_by(WebhookEndpoint.id)).all()


def delivery(session: ReadSession, tenant_id: str, endpoint_id: str, delivery_id: str) -> WebhookDelivery | None:
    statement = (
        select(WebhookDelivery)
        .where(WebhookDelivery.tenant_id == tenant_id, WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.id == delivery_id)
        .options(joinedload(WebhookDelivery.event))
        .execution_options(populate_existing=True)
    )
    return session.scalar(statement)


def deliveries(
    session: ReadSession, tenant_id: str, endpoint_id: str, *, state: str | None, limit: int, cursor: str | None
) -> Sequence[WebhookDelivery]:
    statement = (
        select(WebhookDelivery)
        .where(WebhookDelivery.tenant_id == tenant_id, WebhookDelivery.endpoint_id == endpoint_id)
        .options(joinedload(WebhookDelivery.event))
    )
    if state is not None:
        statement = statement.where(WebhookDelivery.state == state)
    return session.scalars(after_cursor(statement, cursor, at=WebhookDelivery.created_at, row_id=WebhookDelivery.id, limit=limit)).all()


def backlog(session: ReadSession) -> tuple[int, float]:
    """Deliveries that are due or under way, and for how many seconds the oldest has been due."""
    due = and_(WebhookDelivery.state == PENDING, WebhookDelivery.available_at <= utc_now())
    count, oldest = session.execute(select(func.count(), func.min(WebhookDelivery.available_at)).where(due)).one()
    return count, 0.0 if oldest is None else max(0.0, (database_time(session) - oldest).total_seconds())


def _due() -> ColumnElement[bool]:
    """Due, in nobody's hands, of a living tenant's enabled endpoint that is not just being served: one at a time each."""
    busy = aliased(WebhookDelivery)
    return and_(
        WebhookDelivery.state == PENDING,
        WebhookDelivery.available_at <= utc_now(),
        or_(WebhookDelivery.lease_expires_at.is_(None), WebhookDelivery.lease_expires_at <= utc_now()),
        exists().where(WebhookEndpoint.id == WebhookDelivery.endpoint_id, WebhookEndpoint.enabled),
        exists().where(Tenant.id == WebhookDelivery.tenant_id, Tenant.deleted_at.is_(None)),
        ~exists().where(busy.endpoint_id == WebhookDelivery.endpoint_id, busy.lease_expires_at > utc_now()),
    )


def any_due(session: ReadSession) -> bool:
    """Asked before a claim: on SQLite a claim makes every other writer wait, a look does not."""
    return session.scalar(select(WebhookDelivery.id).where(_due()).limit(1)) is not None


def next_due(session: WriteSession) -> WebhookDelivery | None:
    """The delivery that has waited longest; on PostgreSQL rows that another claimer holds are skipped."""
    statement = (
        select(WebhookDelivery)
        .where(_due())
        .order_by(WebhookDelivery.available_at, WebhookDelivery.created_at, WebhookDelivery.id)
        .limit(1)
        .options(joinedload(WebhookDelivery.event, innerjoin=True), joinedload(WebhookDelivery.endpoint, innerjoin=True))
        .with_for_update(skip_locked=True, of=WebhookDelivery)
        .execution_options(populate_existing=True)
    )
    return session.scalar(statement)


def transition(session: WriteSession, *, delivery_id: str, fence: int, values: Mapping[str, Any]) -> bool:
    """Change a pending delivery that is still under `fence`. False: another claim or a replay came between."""
    statement = update(WebhookDelivery).where(
        WebhookDelivery.id == delivery_id, WebhookDelivery.fence == fence, WebhookDelivery.state == PENDING
    )
    result = cast(CursorResult[Any], session.execute(statement.values(**values), execution_options={"synchronize_session": False}))
    return result.rowcount == 1


def purge(session: WriteSession, *, before: dt.datetime) -> int:
    """Forget deliveries that ended before then, and events that no delivery needs any more. Returns how many deliveries."""
    options = {"synchronize_session": False}
    ended = delete(WebhookDelivery).where(WebhookDelivery.state != PENDING, WebhookDelivery.finished_at < before)
    num_deleted = cast(CursorResult[Any], session.execute(ended, execution_options=options)).rowcount
    needed = exists().where(WebhookDelivery.event_id == WebhookEvent.id)
    session.execute(delete(WebhookEvent).where(WebhookEvent.created_at < before, ~needed), execution_options=options)
    return num_deleted
