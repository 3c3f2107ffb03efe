"""Tables of webhooks: where to, what happened, and each delivery of one event to one endpoint."""

from __future__ import annotations

import datetime as dt
from typing import Any
from uuid import uuid4

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.db import Table, UtcDateTime, utc_now

PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"


def _new_id() -> str:
    return uuid4().hex


class WebhookEndpoint(Table):
    """A URL that wants to hear. `previous_secret` signs too until `previous_until`, so that a receiver can change in peace."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index(None, "tenant_id", "created_at"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    url: Mapped[str] = mapped_column(String(2048))
    description: Mapped[str] = mapped_column(String(500))
    event_types: Mapped[list[str]] = mapped_column(JSON)
    enabled: Mapped[bool] = mapped_column(default=True)
    disabled_reason: Mapped[str | None] = mapped_column(String(200))
    secret: Mapped[str] = mapped_column(Text)
    previous_secret: Mapped[str | None] = mapped_column(Text)
    previous_until: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    created_by: Mapped[str] = mapped_column(String(64))


class WebhookEvent(Table):
    """Something that happened, written in the transaction in which it did. Its id is the `webhook-id` of every delivery."""

    __tablename__ = "webhook_events"
    __table_args__ = (Index(None, "tenant_id", "created_at"), Index(None, "created_at"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())


class WebhookDelivery(Table):
    """One event on its way to one endpoint; the row is outbox, lease and log in one.

    pending -> delivered | failed, and back to pending by a replay. `fence` grows with every claim; `log` has an entry
    for each attempt {number, at, status, error, detail, took_ms}, the latest `service.MAX_LOG`.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="state"),
        UniqueConstraint("endpoint_id", "event_id"),
        Index(None, "state", "available_at"),
        Index(None, "endpoint_id", "created_at", "id"),
        Index(None, "event_id"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    endpoint_id: Mapped[str] = mapped_column(String(32), ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    event_id: Mapped[str] = mapped_column(String(32), ForeignKey("webhook_events.id"))
    state: Mapped[str] = mapped_column(String(16), default=PENDING)
    attempt: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)
    available_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    lease_expires_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    log: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    finished_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)

    endpoint: Mapped[WebhookEndpoint] = relationship(lazy="raise")
    event: Mapped[WebhookEvent] = relationship(lazy="raise")
