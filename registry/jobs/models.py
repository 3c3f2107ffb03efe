"""Tables of jobs, of what happened to them, and of the hints that wait for the broker."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
FINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
STATE, PROGRESS = "state", "progress"
DEFAULT_QUEUE = "cpu"


class Job(Table):
    """One piece of asynchronous work; the row is the truth.

    queued -> running -> succeeded | failed | cancelled, and back to queued by retry, release or a lost lease.
    `fence` grows with every claim and never shrinks; what carries an older one is refused.
    `traceparent` is the trace of the request that asked.
    `subject_id` is the id of the key that asked, `adapter` the name of the adapter that it is about, if it is about one.
    `queue` is the sort of machine that it needs; a higher `priority` (0 to 9) goes first. `num_events` is the number of the
    job's last event.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="lease"),
        Index(None, "state", "available_at"),
        Index(None, "state", "lease_expires_at"),
        Index(None, "tenant_id", "created_at", "id"),
        Index(None, "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"))
    subject_id: Mapped[str] = mapped_column(String(32))
    adapter: Mapped[str | None] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(64))
    queue: Mapped[str] = mapped_column(String(32), default=DEFAULT_QUEUE, server_default=DEFAULT_QUEUE)
    priority: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    traceparent: Mapped[str | None] = mapped_column(String(64))
    payload: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16), default=QUEUED)
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int]
    fence: Mapped[int] = mapped_column(default=0)
    available_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    num_events: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now(), onupdate=utc_now())
    finished_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)


class JobEvent(Table):
    """One thing that happened to a job, written with it in one transaction and never changed.

    Numbers run 1, 2, 3 ... without gaps in each job: they are taken under the lock of the job's row, so that who has
    read number n never finds a lower one later.
    """

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "tenant_id"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"))
    type: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int]
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())


class OutboxMessage(Table):
    """A hint that a job may be claimed, committed with the job, deleted once the broker has it.

    A relay takes it for a moment (`taken_until`, `fence`), publishes, then deletes it under the same fence.
    """

    __tablename__ = "job_outbox"
    __table_args__ = (Index(None, "available_at"), Index(None, "job_id"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    queue: Mapped[str] = mapped_column(String(32))
    priority: Mapped[int]
    available_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    taken_until: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    fence: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
