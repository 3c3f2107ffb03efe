"""Tables of quotas: the limits of a tenant, and the minute that its inference is in."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now

UNLIMITED = -1


class Quota(Table):
    """Limits of one tenant; also the lock under which its counts change.

    A column is null for the operator's default, UNLIMITED for no limit, 0 for nothing at all. There may be no row: it
    is made when somebody must lock it. The application's role may neither set nor change a limit.
    """

    __tablename__ = "quotas"

    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), primary_key=True)
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    adapters: Mapped[int | None] = mapped_column(BigInteger)
    versions_per_day: Mapped[int | None] = mapped_column(BigInteger)
    running_jobs: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now(), onupdate=utc_now())


class RateWindow(Table):
    """The last minute in which a limited tenant asked for inference, counted in minutes since 1970 by the database's clock.

    `tokens` is the sum over the requests of that minute of what each used where that is settled, else what it reserved.
    A minute that is over needs no settling: the next request starts another one.
    """

    __tablename__ = "rate_windows"
    __table_args__ = (CheckConstraint("requests >= 0", name="requests"),)

    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), primary_key=True)
    minute: Mapped[int] = mapped_column(BigInteger)
    requests: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
