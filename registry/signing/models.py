"""Tables of signing keys and policies."""

from __future__ import annotations

import datetime as dt
from uuid import uuid4

from sqlalchemy import CheckConstraint, ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Table, UtcDateTime, utc_now

OFF, IF_PRESENT, REQUIRE = "off", "verify_if_present", "require"
POLICIES = (OFF, IF_PRESENT, REQUIRE)  # each asks for more than the one before
_KNOWN = ", ".join(f"'{policy}'" for policy in POLICIES)


class SigningKey(Table):
    """A public key that a tenant trusts. Its row stays when it is revoked: versions name it, and it never comes back."""

    __tablename__ = "signing_keys"
    __table_args__ = (UniqueConstraint("tenant_id", "name"), UniqueConstraint("tenant_id", "fingerprint"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid4().hex)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(63))
    public_key: Mapped[str] = mapped_column(Text)
    fingerprint: Mapped[str] = mapped_column(String(64))
    curve: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    created_by: Mapped[str] = mapped_column(String(64))
    revoked_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    revoked_by: Mapped[str | None] = mapped_column(String(64))


class SigningPolicy(Table):
    """What a tenant's pushes must show: the stricter of the tenant's own choice and the operators' `floor`."""

    __tablename__ = "signing_policies"
    __table_args__ = (
        CheckConstraint(f"policy IN ({_KNOWN})", name="policy"),
        CheckConstraint(f"floor IN ({_KNOWN})", name="floor"),
    )

    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), primary_key=True)
    policy: Mapped[str] = mapped_column(String(20), default=OFF)
    floor: Mapped[str] = mapped_column(String(20), default=OFF)
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now(), onupdate=utc_now())
    updated_by: Mapped[str] = mapped_column(String(64))
