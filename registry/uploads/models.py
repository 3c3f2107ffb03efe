"""Table of uploads in parts."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from registry.blobs.store import PartedUpload
from registry.db import Table, UtcDateTime, utc_now

OPEN, FINALISING, DONE, REJECTED, ABORTED, EXPIRED = "open", "finalising", "done", "rejected", "aborted", "expired"
LIVE = (OPEN, FINALISING)

_LIVE = text("state IN ('open', 'finalising')")


class LargeUpload(Table):
    """open -> finalising -> done | rejected, and open -> aborted | expired.

    A tenant has one live upload of a digest, so that whoever begins it again goes on where it stopped.
    `handle` is the store's name for the parts.
    """

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("state IN ('open', 'finalising', 'done', 'rejected', 'aborted', 'expired')", name="state"),
        Index("uq_uploads_live", "tenant_id", "sha256", unique=True, sqlite_where=_LIVE, postgresql_where=_LIVE),
        Index(None, "tenant_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    part_bytes: Mapped[int] = mapped_column(BigInteger)
    handle: Mapped[str] = mapped_column(String(1024))
    state: Mapped[str] = mapped_column(String(16), default=OPEN)
    reason: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    job_id: Mapped[str | None] = mapped_column(String(32))
    created_by: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    expires_at: Mapped[dt.datetime] = mapped_column(UtcDateTime)

    @property
    def parted(self) -> PartedUpload:
        """What the store needs to know of it."""
        return PartedUpload(self.tenant_id, self.id, self.handle, self.size, self.part_bytes)
