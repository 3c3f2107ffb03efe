"""Queries over jobs. Every transition is one UPDATE that is conditional on the fence it was decided under."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Select, and_, or_, select, update

from registry.db import ReadSession, WriteSession, utc_now
from registry.jobs.models import QUEUED, RUNNING, Job
from registry.pagination import after_cursor


def find(session: ReadSession, tenant_id: str | None, job_id: str) -> Job | None:
    """`tenant_id` None finds every tenant's jobs and the operators': for admins and workers alone."""
    statement = select(Job).where(Job.id == job_id)
    return session.scalar(_owned(statement, tenant_id).execution_options(populate_existing=True))


def lock(session: WriteSession, job_id: str) -> Job:
    """The row as it is now, held until the transaction ends: nobody cancels between this reading and our writing."""
    return session.scalars(select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)).one()


def list_jobs(session: ReadSession, tenant_id: str | None, *, state: str | None, limit: int, cursor: str | None) -> Sequence[Job]:
    statement = _owned(select(Job), tenant_id)
    if state is not None:
        statement = statement.where(Job.state == state)
    return session.scalars(after_cursor(statement, cursor, at=Job.created_at, row_id=Job.id, limit=limit)).all()


def _owned(statement: Select[Job], tenant_id: str | None) -> Select[Job]:
    return statement if tenant_id is None else statement.where(Job.tenant_id == tenant_id)


def _lease_lost() -> ColumnElement[bool]:
    return and_(Job.state == RUNNING, Job.lease_expires_at < utc_now())


def next_claimable(session: WriteSession, kinds: Collection[str]) -> Job | None:
    """The job that has waited longest: queued and due, or running under a lease that ran out.

    PostgreSQL skips rows that another claimer holds; on SQLite the write transaction is alone anyway.
    """
    due = and_(Job.state == QUEUED, Job.available_at <= utc_now())
    statement = (
        select(Job)
        .where(Job.kind.in_(kinds), or_(due, _lease_lost()), Job.attempt < Job.max_attempts, Job.cancel_requested.is_(False))
        .order_by(Job.available_at, Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return session.scalar(statement)


def abandoned(session: WriteSession) -> Sequence[Job]:
    """Jobs that nobody holds any more and nobody may claim again: attempts used up, or cancelled meanwhile."""
    statement = (
        select(Job)
        .where(_lease_lost(), or_(Job.attempt >= Job.max_attempts, Job.cancel_requested))
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).all()


def transition(session: WriteSession, *, job_id: str, fence: int, state_before: str, values: Mapping[str, Any]) -> bool:
    """Change a job that is still in `state_before` under `fence`. False: somebody else was faster."""
    statement = update(Job).where(Job.id == job_id, Job.fence == fence, Job.state == state_before).values(**values)
    result = cast(CursorResult[Any], session.execute(statement, execution_options={"synchronize_session": False}))
    return result.rowcount == 1
