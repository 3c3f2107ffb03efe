"""The blobs a tenant has pushed, and who needs them. A row promises that the bytes are in the store.

Bytes without a row, and rows that nobody references, are garbage once they have been left alone for the grace time.
"""

from __future__ import annotations

import datetime as dt

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now


class Blob(Table):
    """`touched_at`: last uploaded, or last let go by an owner; the GC's grace counts from there.

    `deleting_until`: the GC of `deleting_by` may be removing the bytes until then. Such a row promises nothing; after that
    time it belongs to the next GC, or to whoever uploads the bytes again.
    """

    __tablename__ = "blobs"

    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    touched_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime, default=utc_now())
    deleting_until: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    deleting_by: Mapped[str | None] = mapped_column(String(32))


class BlobReference(Table):
    """`owner_id` (a version, which stands for its forms too) needs these bytes, also while it is deleted and may come back.

    No foreign key on the blob: a reference outlives bytes that were lost, and is good again when they are uploaded again.
    """

    __tablename__ = "blob_references"

    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner_id: Mapped[str] = mapped_column(String(32), primary_key=True, index=True)
