"""Replicas, as they last described themselves, and what each holds. All of it is rebuilt by heartbeats."""

from __future__ import annotations

import datetime as dt
from uuid import uuid4

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now

REGISTERED, READY, DRAINING = "registered", "ready", "draining"
NO_SEQUENCE = -1  # of a replica that has registered and not reported yet


class Replica(Table):
    """One runtime process. `heartbeat_at` is the database's clock; a replica is live while it is recent and `ready`."""

    __tablename__ = "replicas"
    __table_args__ = (
        UniqueConstraint("key_id", "url"),
        CheckConstraint("state IN ('registered', 'ready', 'draining')", name="state"),
        Index("ix_replicas_choice", "base_model_id", "state", "heartbeat_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid4().hex)
    key_id: Mapped[str] = mapped_column(String(32), ForeignKey("api_keys.id"))
    url: Mapped[str] = mapped_column(String(512))
    base_model_id: Mapped[str] = mapped_column(String(32), ForeignKey("base_models.id"))
    max_rank: Mapped[int]
    num_pages: Mapped[int] = mapped_column(BigInteger)
    page_bytes: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16), default=REGISTERED)
    sequence: Mapped[int] = mapped_column(BigInteger, default=NO_SEQUENCE)
    num_queued: Mapped[int] = mapped_column(default=0)
    num_running: Mapped[int] = mapped_column(default=0)
    num_free_pages: Mapped[int] = mapped_column(BigInteger, default=0)
    registered_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    heartbeat_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)


class ReplicaResident(Table):
    """One adapter that a replica reported. No foreign key on the tenant: a report may outlive what it names."""

    __tablename__ = "replica_residents"
    __table_args__ = (CheckConstraint("tier IN ('pool', 'host', 'disk')", name="tier"),)

    replica_id: Mapped[str] = mapped_column(String(32), ForeignKey("replicas.id", ondelete="CASCADE"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    form_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tier: Mapped[str] = mapped_column(String(8))
