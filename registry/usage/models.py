"""Tables of usage: which requests are settled, and the sums of a day."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import BigInteger, Date, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now


class UsageRecord(Table):
    """One request that is settled, so that a report which is sent again counts nothing twice.

    Kept for as long as its grant could still be reported, then forgotten: the sums are in UsageDay.
    """

    __tablename__ = "usage_records"
    __table_args__ = (Index(None, "settled_at"),)

    request_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    settled_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())


class UsageDay(Table):
    """Sums over the requests of one key for one model that ended on one day of UTC.

    `model` is the adapter's name, or the base model's where that answered alone: no adapter is named like a base model.
    """

    __tablename__ = "usage_days"

    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), primary_key=True)
    day: Mapped[dt.date] = mapped_column(Date, primary_key=True)
    model: Mapped[str] = mapped_column(String(128), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    is_adapter: Mapped[bool]
    requests: Mapped[int] = mapped_column(BigInteger)
    cancelled: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
