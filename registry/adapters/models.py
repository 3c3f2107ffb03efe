"""Rows of adapters, versions, forms and aliases. Every one carries its tenant.

A version's content columns never change after insert; only `status` and `reason` move:
pending -> ready | rejected, any -> deleted, rejected | deleted -> pending (pushed again), deleted -> ready (restored).
"""

from __future__ import annotations

import datetime as dt
from typing import Any
from uuid import uuid4

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.base_models.models import BaseModelRevision
from registry.db import Table, UtcDateTime, utc_now
from registry.signing.models import SigningKey

PENDING, READY, REJECTED, DELETED = "pending", "ready", "rejected", "deleted"
RAW = "raw"


def _new_id() -> str:
    return uuid4().hex


class Adapter(Table):
    """A named, mutable pointer in a tenant.

    A deleted adapter keeps its row, so that a push to the same name goes on counting: `name@3` never means two things.
    """

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        Index("ix_adapters_listing", "tenant_id", "created_at", "id"),
        Index("ix_adapters_by_base_model", "tenant_id", "base_model_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(63), index=True)
    base_model_id: Mapped[str] = mapped_column(String(32), ForeignKey("base_models.id"), index=True)
    description: Mapped[str] = mapped_column(Text, default="")
    tags: Mapped[list[str]] = mapped_column(JSON, default=list)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now(), onupdate=utc_now())
    deleted_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)

    base_model: Mapped[BaseModelRevision] = relationship(lazy="raise")


class AdapterTerm(Table):
    """One word or tag under which an adapter is found (`search`). A deleted adapter keeps its own."""

    __tablename__ = "adapter_terms"

    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), primary_key=True)
    term: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    adapter_id: Mapped[str] = mapped_column(String(32), ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True, index=True)


class AdapterVersion(Table):
    """Immutable content: `manifest` is `VersionManifest.to_json()`, `version_digest` its digest.

    Deleted, it keeps in `deleted_aliases` the names that it took along; `purged_at` says that its forms and its hold on
    bytes are given up for good.
    """

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        UniqueConstraint("adapter_id", "version_digest", "base_model_id", name="uq_adapter_versions_content"),
        CheckConstraint("status IN ('pending', 'ready', 'rejected', 'deleted')", name="status"),
        Index("ix_adapter_versions_search", "tenant_id", "status", "rank", "adapter_id"),
        Index("ix_adapter_versions_made", "tenant_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), index=True)
    adapter_id: Mapped[str] = mapped_column(String(32), ForeignKey("adapters.id"))
    number: Mapped[int]
    version_digest: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16), default=PENDING)
    reason: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    base_model_id: Mapped[str] = mapped_column(String(32), ForeignKey("base_models.id"), index=True)
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)
    rank: Mapped[int]
    targets: Mapped[list[str]] = mapped_column(JSON)
    num_params: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    created_by: Mapped[str] = mapped_column(String(64))
    deleted_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)
    deleted_aliases: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    purged_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime)

    adapter: Mapped[Adapter] = relationship(lazy="raise")
    base_model: Mapped[BaseModelRevision] = relationship(lazy="raise")
    forms: Mapped[list[Form]] = relationship(lazy="raise", back_populates="version")
    signature: Mapped[VersionSignature | None] = relationship(lazy="raise")


class VersionSignature(Table):
    """The version's `model.sig` was verified with that key at that time. Absent where it has none, or nobody asked."""

    __tablename__ = "version_signatures"

    version_id: Mapped[str] = mapped_column(String(32), ForeignKey("adapter_versions.id"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    key_id: Mapped[str] = mapped_column(String(32), ForeignKey("signing_keys.id"), index=True)
    verified_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now(), onupdate=utc_now())

    key: Mapped[SigningKey] = relationship(lazy="raise")


class Form(Table):
    """What a replica serves of a version. `manifest` is `FormManifest.to_json()`, `form_digest` its digest."""

    __tablename__ = "forms"
    __table_args__ = (
        UniqueConstraint("version_id", "form_digest"),
        Index("ix_forms_digest", "tenant_id", "form_digest"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"))
    version_id: Mapped[str] = mapped_column(String(32), ForeignKey("adapter_versions.id"))
    kind: Mapped[str] = mapped_column(String(16))
    form_digest: Mapped[str] = mapped_column(String(64))
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)
    size_bytes: Mapped[int] = mapped_column(BigInteger)

    version: Mapped[AdapterVersion] = relationship(lazy="raise", back_populates="forms")


class Alias(Table):
    """A movable name of one ready version. `generation` is the ETag and grows with every move, also across deletes."""

    __tablename__ = "aliases"
    __table_args__ = (UniqueConstraint("adapter_id", "name"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), index=True)
    adapter_id: Mapped[str] = mapped_column(String(32), ForeignKey("adapters.id"))
    name: Mapped[str] = mapped_column(String(63))
    version_id: Mapped[str] = mapped_column(String(32), ForeignKey("adapter_versions.id"), index=True)
    generation: Mapped[int]
    updated_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now(), onupdate=utc_now())
    updated_by: Mapped[str] = mapped_column(String(64))

    version: Mapped[AdapterVersion] = relationship(lazy="raise")


class AliasMove(Table):
    """History of an alias, one row a generation. `number` null: the alias was removed."""

    __tablename__ = "alias_moves"
    __table_args__ = (UniqueConstraint("adapter_id", "name", "generation"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=_new_id)
    tenant_id: Mapped[str] = mapped_column(String(32), ForeignKey("tenants.id"), index=True)
    adapter_id: Mapped[str] = mapped_column(String(32), ForeignKey("adapters.id"))
    name: Mapped[str] = mapped_column(String(63))
    generation: Mapped[int]
    number: Mapped[int | None]
    moved_at: Mapped[dt.datetime] = mapped_column(UtcDateTime, default=utc_now())
    moved_by: Mapped[str] = mapped_column(String(64))
