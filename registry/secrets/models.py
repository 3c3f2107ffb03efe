"""Table of tenants' secrets."""

from __future__ import annotations

import datetime as dt
from uuid import uuid4

from sqlalchemy import ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now


class TenantSecret(Table):
    """One named secret. `sealed` opens only with the context that `service.context` makes of tenant and name."""

    __tablename__ = "tenant_secrets"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid4().hex)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(63))
    sealed: Mapped[str] = mapped_column(Text)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now(), onupdate=utc_now())
    updated_by: Mapped[str] = mapped_column(String(64))
