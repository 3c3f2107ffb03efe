"""Tables of tenants and API keys."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import JSON, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now


class Tenant(Table):
    """An isolation boundary. A deleted tenant keeps its row, and its name is never given to another.

    `purge_requested_at`: the GC gives up what it holds without waiting for the retention time; it cannot be restored.
    """

    __tablename__ = "tenants"
    __table_args__ = (Index(None, "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    deleted_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    purge_requested_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)


class ApiKey(Table):
    """One API key: its HMAC, never its secret. `tenant_id` is null for operators' and replicas' keys.

    `adapter_prefixes` null: any adapter. `successor_id`: the key that rotation put in its place.
    """

    __tablename__ = "api_keys"
    __table_args__ = (Index(None, "tenant_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(100))
    token_hmac: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    adapter_prefixes: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    created_by: Mapped[str | None] = mapped_column(String(32))
    expires_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    successor_id: Mapped[str | None] = mapped_column(String(32))
