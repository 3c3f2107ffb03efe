"""One row a registered base model. Weights stay on disk at `location`; the row knows what they are."""

from __future__ import annotations

import datetime as dt
from typing import Any
from uuid import uuid4

from sqlalchemy import JSON, CheckConstraint, String
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now

PENDING, READY, FAILED = "pending", "ready", "failed"


class BaseModelRevision(Table):
    """`spec` is `BaseSpec.to_json()` and, like `base_digest` and `location`, null until the import is done."""

    __tablename__ = "base_models"
    __table_args__ = (CheckConstraint("status IN ('pending', 'ready', 'failed')", name="status"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid4().hex)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    status: Mapped[str] = mapped_column(String(16), default=PENDING)
    reason: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    base_digest: Mapped[str | None] = mapped_column(String(64), unique=True)
    source: Mapped[dict[str, Any]] = mapped_column(JSON)
    location: Mapped[str | None] = mapped_column(String(1024))
    upstream_names: Mapped[list[str]] = mapped_column(JSON)
    spec: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
