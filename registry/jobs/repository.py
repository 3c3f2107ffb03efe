"""Queries over jobs. Every transition is one UPDATE that is conditional on the fence it was decided under, with its event."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, ColumnElement, Integer, Row, Select, String, and_, case, cast, func, literal, or_, select, true, update
from sqlalchemy.orm import aliased

from registry.db import ReadSession, UtcDateTime, WriteSession, database_time, utc_now
from registry.inserts import table_of
from registry.jobs.models import PROGRESS, QUEUED, RUNNING, Job, JobEvent
from registry.pagination import after_cursor
from registry.quotas.models import UNLIMITED, Quota
from registry.tenants.auth import Subject
from registry.tenants.limits import name_within

TOP_PRIORITY = 9
AGED_S = 600.0
"""Who has waited this long goes before every priority: a stream of urgent jobs starves nobody for ever."""


def visible_to(subject: Subject) -> ColumnElement[bool]:
    """A key that is limited to some adapters sees jobs about those, and what it asked for itself."""
    if subject.adapter_prefixes is None:
        return true()
    return or_(Job.subject_id == subject.key_id, name_within(Job.adapter, subject.adapter_prefixes))


def find(session: ReadSession, tenant_id: str | None, job_id: str, *, visible: ColumnElement[bool] | None = None) -> Job | None:
    """`tenant_id` None finds every tenant's jobs and the operators': for admins and workers alone."""
    statement = select(Job).where(Job.id == job_id, true() if visible is None else visible)
    return session.scalar(_owned(statement, tenant_id).execution_options(populate_existing=True))


def lock(session: WriteSession, job_id: str) -> Job:
    """The row as it is now, held until the transaction ends: nobody cancels between this reading and our writing."""
    return session.scalars(select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)).one()


def list_jobs(session: ReadSession, subject: Subject, *, state: str | None, limit: int, cursor: str | None) -> Sequence[Job]:
    statement = _owned(select(Job), subject.tenant_id).where(visible_to(subject))
    if state is not None:
        statement = statement.where(Job.state == state)
    return session.scalars(after_cursor(statement, cursor, at=Job.created_at, row_id=Job.id, limit=limit)).all()


def _owned(statement: Select[Job], tenant_id: str | None) -> Select[Job]:
    return statement if tenant_id is None else statement.where(Job.tenant_id == tenant_id)


def _lease_lost() -> ColumnElement[bool]:
    return and_(Job.state == RUNNING, Job.lease_expires_at < utc_now())


def next_claimable(
    session: ReadSession, *, kinds: Collection[str], job_id: str | None, max_running: int, passed_over: Collection[str]
) -> Row[str, str | None] | None:
    """(id, tenant id) of the job that goes next, unlocked: highest priority first, then the one that has waited longest.

    Queued and due, or running under a lease that ran out; of a tenant that runs fewer than its quota, or `max_running`
    (0: any number) where that says nothing.
    """
    aged_at = literal(database_time(session) - dt.timedelta(seconds=AGED_S), UtcDateTime())
    urgency = case((Job.available_at < aged_at, TOP_PRIORITY), else_=Job.priority)
    statement = select(Job.id, Job.tenant_id).where(_claimable(kinds, max_running), Job.id.not_in(passed_over))
    if job_id is not None:
        statement = statement.where(Job.id == job_id)
    ordered = statement.order_by(urgency.desc(), Job.available_at, Job.created_at, Job.id).limit(1)
    return session.execute(ordered).one_or_none()


def num_running(session: ReadSession, tenant_id: str) -> int:
    return session.scalar(select(func.count()).where(Job.tenant_id == tenant_id, _is_running(Job))) or 0


def lock_claimable(session: WriteSession, job_id: str, *, kinds: Collection[str], max_running: int) -> Job | None:
    """The job, locked, if it may still be claimed and nobody else is claiming it."""
    statement = select(Job).where(Job.id == job_id, _claimable(kinds, max_running)).with_for_update(of=Job, skip_locked=True)
    return session.scalar(statement.execution_options(populate_existing=True))


def _claimable(kinds: Collection[str], max_running: int) -> ColumnElement[bool]:
    due = and_(Job.state == QUEUED, Job.available_at <= utc_now())
    fit = and_(Job.kind.in_(kinds), or_(due, _lease_lost()), Job.attempt < Job.max_attempts, Job.cancel_requested.is_(False))
    other = aliased(Job)
    running = select(func.count()).where(other.tenant_id == Job.tenant_id, _is_running(other)).correlate(Job).scalar_subquery()
    own = select(Quota.running_jobs).where(Quota.tenant_id == Job.tenant_id).correlate(Job).scalar_subquery()
    limit = func.coalesce(own, max_running or UNLIMITED)
    return and_(fit, or_(Job.tenant_id.is_(None), limit == UNLIMITED, running < limit))


def _is_running(job: type[Job]) -> ColumnElement[bool]:
    return and_(job.state == RUNNING, job.lease_expires_at >= utc_now())


@dataclass(frozen=True)
class Backlog:
    """Jobs of one kind in one state. `oldest_s`: how long the longest-waiting due one of them has waited; of queued ones alone."""

    kind: str
    state: str
    count: int
    oldest_s: float | None


def backlog(session: ReadSession) -> list[Backlog]:
    """What has not ended, by kind and state. One statement, over an index."""
    now = database_time(session)
    statement = select(Job.kind, Job.state, func.count(), func.min(Job.available_at)).where(Job.state.in_((QUEUED, RUNNING)))
    rows = session.execute(statement.group_by(Job.kind, Job.state).order_by(Job.kind, Job.state)).all()
    return [
        Backlog(kind, state, count, max(0.0, (now - available_at).total_seconds()) if state == QUEUED else None)
        for kind, state, count, available_at in rows
    ]


def is_any_lost(session: ReadSession, kinds: Collection[str]) -> bool:
    return session.scalar(select(Job.id).where(_lease_lost(), Job.kind.in_(kinds)).limit(1)) is not None


def lost(session: WriteSession, kinds: Collection[str] | None) -> Sequence[Job]:
    """Running jobs whose lease ran out, locked; who is claiming or ending one at this moment is left alone."""
    statement = select(Job).where(_lease_lost()).with_for_update(skip_locked=True).execution_options(populate_existing=True)
    return session.scalars(statement if kinds is None else statement.where(Job.kind.in_(kinds))).all()


def is_cancel_requested(session: ReadSession, job_id: str) -> bool:
    return bool(session.scalar(select(Job.cancel_requested).where(Job.id == job_id)))


def transition(
    session: WriteSession, *, job_id: str, fence: int, state_before: str, values: Mapping[str, Any], event: str | None = None
) -> bool:
    """Change a job that is still in `state_before` under `fence`, and say so in an event of type `event`.

    False: somebody else was faster.
    """
    changes = dict(values) if event is None else {**values, "num_events": Job.num_events + 1}
    statement = update(Job).where(Job.id == job_id, Job.fence == fence, Job.state == state_before).values(**changes)
    returning = statement.returning(Job.tenant_id, Job.num_events, Job.state, Job.attempt)
    changed = session.execute(returning, execution_options={"synchronize_session": False}).one_or_none()
    if changed is None:
        return False
    if event is not None:
        tenant_id, number, state, attempt = changed
        add_event(
            session, job_id=job_id, tenant_id=tenant_id, number=number, type=event, state=state, attempt=attempt, data=_said(values, event)
        )
    return True


def _said(values: Mapping[str, Any], event: str) -> dict[str, Any] | None:
    """What an event tells beside the state: the progress, or how the attempt ended."""
    if event == PROGRESS:
        return dict(values["progress"])
    return {name: values[name] for name in ("error", "result") if values.get(name) is not None} or None


def add_event(session: WriteSession, **values: Any) -> None:
    session.execute(table_of(JobEvent).insert().values(**values))


def events_after(session: ReadSession, job_id: str, *, number: int, limit: int) -> Sequence[JobEvent]:
    statement = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.number > number).order_by(JobEvent.number).limit(limit)
    return session.scalars(statement).all()


def with_news(session: ReadSession, seen: Mapping[str, int]) -> Sequence[str]:
    """Those of the jobs in `seen` that have events above that number. One parameter and no row for a job in which nothing happens."""
    watched = func.json_each(literal(dict(seen), JSON)).table_valued("key", "value").alias("watched")
    number = cast(cast(watched.c.value, String), Integer)
    return session.scalars(select(Job.id).join(watched, Job.id == watched.c.key).where(Job.num_events > number)).all()
