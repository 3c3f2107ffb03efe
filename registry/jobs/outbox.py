"""The transactional outbox of job hints: written with the job, taken by a relay, deleted when the broker has it.

Without a broker nothing is written: workers poll the table of jobs. A hint may be published twice and may come too
late or never; the row of the job alone decides (DESIGN 3).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update

from registry.db import ReadSession, WriteSession, database_time, utc_now
from registry.inserts import Rows, insert_together
from registry.jobs.models import Job, OutboxMessage


@dataclass(frozen=True)
class Hint:
    """One message that a relay holds until it has published it. `id` is the message's id at the broker too.

    `due_for_s`: how long it had been due when the relay took it. `traceparent` travels in the message's headers.
    """

    id: str
    job_id: str
    queue: str
    priority: int
    fence: int
    due_for_s: float = 0.0
    traceparent: str | None = None


def post(session: WriteSession, job: Job) -> None:
    """Leave a hint for the relay that `job` may be claimed once it is due, where a broker is configured."""
    named = {"id": job.id, "tenant_id": job.tenant_id, "queue": job.queue, "priority": job.priority}
    if hint := hint_of(session, named, available_at=job.available_at):
        insert_together(session, hint)


def hint_of(session: WriteSession, job: Mapping[str, Any], **due: dt.datetime) -> Rows:
    """The hint's row, due now or `available_at`; none where no broker is configured."""
    if not session.info.get("dispatch", False):
        return {}
    named = {name: job[name] for name in ("tenant_id", "queue", "priority")}
    return {OutboxMessage: {"id": uuid4().hex, "job_id": job["id"], **named, **due}}


def is_anything_due(session: ReadSession) -> bool:
    """A look without a lock, so that idle relays do not queue for SQLite's one writer."""
    return session.scalar(select(OutboxMessage.id).where(_due()).limit(1)) is not None


def take(session: WriteSession, *, limit: int, hold_s: float) -> list[Hint]:
    """The hints that are due and that no other relay holds, held by us for `hold_s`. Commit before publishing."""
    statement = (
        select(OutboxMessage)
        .where(_due())
        .order_by(OutboxMessage.available_at, OutboxMessage.created_at, OutboxMessage.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    messages = session.scalars(statement).all()
    now = database_time(session)
    until = now + dt.timedelta(seconds=hold_s)
    for message in messages:
        message.taken_until, message.fence = until, message.fence + 1
    session.flush()
    traces = _traces(session, [message.job_id for message in messages])
    return [_hint(message, now=now, traceparent=traces.get(message.job_id)) for message in messages]


def _traces(session: ReadSession, job_ids: list[str]) -> dict[str, str | None]:
    rows = session.execute(select(Job.id, Job.traceparent).where(Job.id.in_(job_ids)))
    return {row.id: row.traceparent for row in rows}


def _hint(message: OutboxMessage, *, now: dt.datetime, traceparent: str | None) -> Hint:
    due_for_s = max(0.0, (now - message.available_at).total_seconds())
    return Hint(message.id, message.job_id, message.queue, message.priority, message.fence, due_for_s, traceparent)


def backlog(session: ReadSession) -> tuple[int, float]:
    """How many hints are due and not published, and for how many seconds the oldest has been."""
    statement = select(func.count(), func.min(OutboxMessage.available_at)).where(OutboxMessage.available_at <= utc_now())
    count, oldest = session.execute(statement).one()
    return count, 0.0 if oldest is None else max(0.0, (database_time(session) - oldest).total_seconds())


def _due() -> ColumnElement[bool]:
    free = or_(OutboxMessage.taken_until.is_(None), OutboxMessage.taken_until < utc_now())
    return and_(OutboxMessage.available_at <= utc_now(), free)


def settle(session: WriteSession, hint: Hint) -> None:
    """The broker has it. A hint that another relay took meanwhile stays for that one."""
    session.execute(delete(OutboxMessage).where(OutboxMessage.id == hint.id, OutboxMessage.fence == hint.fence))


def put_back(session: WriteSession, hint: Hint, *, retry_in_s: float) -> None:
    """The broker did not take it: due again in `retry_in_s`."""
    until = database_time(session) + dt.timedelta(seconds=retry_in_s)
    held = update(OutboxMessage).where(OutboxMessage.id == hint.id, OutboxMessage.fence == hint.fence)
    session.execute(held.values(taken_until=until), execution_options={"synchronize_session": False})
