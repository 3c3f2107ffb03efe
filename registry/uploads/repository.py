"""Queries over uploads. `tenant_id` comes first: an upload of another tenant does not exist."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select

from registry.db import ReadSession, WriteSession, utc_now
from registry.pagination import after_cursor
from registry.uploads.models import LIVE, OPEN, LargeUpload


def get(session: ReadSession, tenant_id: str, upload_id: str) -> LargeUpload | None:
    return session.scalar(select(LargeUpload).where(LargeUpload.tenant_id == tenant_id, LargeUpload.id == upload_id))


def lock(session: WriteSession, tenant_id: str, upload_id: str) -> LargeUpload | None:
    """As it is now, held until the transaction ends."""
    statement = select(LargeUpload).where(LargeUpload.tenant_id == tenant_id, LargeUpload.id == upload_id)
    return session.scalar(statement.with_for_update().execution_options(populate_existing=True))


def live(session: ReadSession, tenant_id: str, sha256: str) -> LargeUpload | None:
    return session.scalar(
        select(LargeUpload).where(LargeUpload.tenant_id == tenant_id, LargeUpload.sha256 == sha256, LargeUpload.state.in_(LIVE))
    )


def reserved_bytes(session: ReadSession, tenant_id: str) -> int:
    """What the tenant's live uploads will have stored."""
    statement = select(func.coalesce(func.sum(LargeUpload.size), 0))
    return int(session.scalar(statement.where(LargeUpload.tenant_id == tenant_id, LargeUpload.state.in_(LIVE))) or 0)


def count_live(session: ReadSession, tenant_id: str) -> int:
    statement = select(func.count()).select_from(LargeUpload).where(LargeUpload.tenant_id == tenant_id, LargeUpload.state.in_(LIVE))
    return session.scalar(statement) or 0


def overdue(session: ReadSession, tenant_id: str) -> Sequence[LargeUpload]:
    statement = select(LargeUpload).where(
        LargeUpload.tenant_id == tenant_id, LargeUpload.state == OPEN, LargeUpload.expires_at <= utc_now()
    )
    return session.scalars(statement).all()


def page(session: ReadSession, tenant_id: str, *, cursor: str | None, limit: int, created_by: str | None = None) -> Sequence[LargeUpload]:
    """`created_by`: those of one key alone."""
    statement = select(LargeUpload).where(LargeUpload.tenant_id == tenant_id)
    if created_by is not None:
        statement = statement.where(LargeUpload.created_by == created_by)
    return session.scalars(after_cursor(statement, cursor, at=LargeUpload.created_at, row_id=LargeUpload.id, limit=limit)).all()
