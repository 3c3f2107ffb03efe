"""Queries over adapters, versions, forms and aliases. `tenant_id` comes first: another tenant's row does not exist."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import Select, bindparam, exists, func, literal, select
from sqlalchemy.orm import joinedload, selectinload

from registry.adapters.models import DELETED, READY, Adapter, AdapterVersion, VersionSignature
from registry.db import ReadSession, UtcDateTime, WriteSession
from registry.jobs.models import FINAL, Job
from registry.jobs.service import VALIDATE_VERSION
from registry.pagination import decode_number
from registry.quotas.service import day_start


def adapter(session: ReadSession, tenant_id: str, name: str, *, with_deleted: bool = False) -> Adapter | None:
    statement = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.name == name).options(joinedload(Adapter.base_model))
    if not with_deleted:
        statement = statement.where(Adapter.deleted_at.is_(None))
    return session.scalar(statement)


def num_adapters(session: ReadSession, tenant_id: str) -> int:
    return session.scalar(select(func.count()).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))) or 0


def num_versions_today(session: ReadSession, tenant_id: str) -> int:
    """Made in this day of UTC, whatever became of them."""
    made = AdapterVersion.created_at >= literal(day_start(session), UtcDateTime())
    return session.scalar(select(func.count()).where(AdapterVersion.tenant_id == tenant_id, made)) or 0


def lock_named(session: WriteSession, tenant_id: str, name: str) -> Adapter | None:
    """`lock_adapter` by the name of one that is not deleted, without its base model. One statement."""
    return session.scalar(_LOCK_NAMED, {"tenant_id": tenant_id, "name": name})


_LOCK_NAMED = (
    select(Adapter)
    .where(Adapter.tenant_id == bindparam("tenant_id"), Adapter.name == bindparam("name"), Adapter.deleted_at.is_(None))
    .with_for_update()
    .execution_options(populate_existing=True)
)


def lock_adapter(session: WriteSession, tenant_id: str, adapter_id: str) -> Adapter:
    """Versions, aliases and deletion of one adapter change one after the other. (SQLite has one writer anyway.)"""
    statement = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.id == adapter_id).with_for_update()
    locked = session.scalar(statement.execution_options(populate_existing=True))
    assert locked is not None, f"adapter {adapter_id} was read in this transaction and rows are never removed"
    return locked


def _versions(tenant_id: str) -> Select[AdapterVersion]:
    return (
        select(AdapterVersion)
        .where(AdapterVersion.tenant_id == tenant_id)
        .options(
            joinedload(AdapterVersion.base_model),
            joinedload(AdapterVersion.adapter),
            joinedload(AdapterVersion.signature).joinedload(VersionSignature.key),
            selectinload(AdapterVersion.forms),
        )
    )


def version(session: ReadSession, tenant_id: str, adapter_id: str, number: int, *, with_deleted: bool = False) -> AdapterVersion | None:
    statement = _versions(tenant_id).where(AdapterVersion.adapter_id == adapter_id, AdapterVersion.number == number)
    if not with_deleted:
        statement = statement.where(AdapterVersion.status != DELETED)
    return session.scalar(statement.execution_options(populate_existing=True))


def version_by_id(session: ReadSession, tenant_id: str, version_id: str) -> AdapterVersion | None:
    """Deleted ones too."""
    return session.scalar(_versions(tenant_id).where(AdapterVersion.id == version_id).execution_options(populate_existing=True))


def version_by_content(
    session: ReadSession, tenant_id: str, adapter_id: str, *, version_digest: str, base_model_id: str
) -> AdapterVersion | None:
    """Deleted ones too: identical bytes are the same version, whatever became of it."""
    statement = _versions(tenant_id).where(
        AdapterVersion.adapter_id == adapter_id,
        AdapterVersion.version_digest == version_digest,
        AdapterVersion.base_model_id == base_model_id,
    )
    return session.scalar(statement)


def versions_page(
    session: ReadSession, tenant_id: str, adapter_id: str, *, cursor: str | None, limit: int, with_deleted: bool = False
) -> Sequence[AdapterVersion]:
    """Highest number first; the cursor carries the number."""
    statement = _versions(tenant_id).where(AdapterVersion.adapter_id == adapter_id)
    if not with_deleted:
        statement = statement.where(AdapterVersion.status != DELETED)
    if cursor is not None:
        statement = statement.where(AdapterVersion.number < decode_number(cursor))
    return session.scalars(statement.order_by(AdapterVersion.number.desc()).limit(limit + 1)).all()


def living_versions(session: WriteSession, tenant_id: str, adapter_id: str) -> Sequence[AdapterVersion]:
    statement = select(AdapterVersion).where(
        AdapterVersion.tenant_id == tenant_id, AdapterVersion.adapter_id == adapter_id, AdapterVersion.status != DELETED
    )
    return session.scalars(statement).all()


def versions_deleted_at(session: WriteSession, tenant_id: str, adapter_id: str, at: dt.datetime) -> Sequence[AdapterVersion]:
    """Those that the adapter's own deletion took along and nothing has purged, oldest first."""
    statement = _versions(tenant_id).where(
        AdapterVersion.adapter_id == adapter_id,
        AdapterVersion.status == DELETED,
        AdapterVersion.deleted_at == at,
        AdapterVersion.purged_at.is_(None),
    )
    return session.scalars(statement.order_by(AdapterVersion.number)).all()


def purgeable_versions(session: WriteSession, tenant_id: str, adapter_id: str) -> Sequence[AdapterVersion]:
    statement = _versions(tenant_id).where(
        AdapterVersion.adapter_id == adapter_id, AdapterVersion.status == DELETED, AdapterVersion.purged_at.is_(None)
    )
    return session.scalars(statement.order_by(AdapterVersion.number)).all()


def next_number(session: WriteSession, tenant_id: str, adapter_id: str) -> int:
    """Only under `lock_adapter`: rows are never removed, so numbers have no gaps and mean one thing for ever."""
    statement = select(func.max(AdapterVersion.number)).where(
        AdapterVersion.tenant_id == tenant_id, AdapterVersion.adapter_id == adapter_id
    )
    return (session.scalar(statement) or 0) + 1


def has_other_ready_version(session: ReadSession, tenant_id: str, adapter_id: str, *, than: str) -> bool:
    other = exists().where(
        AdapterVersion.tenant_id == tenant_id,
        AdapterVersion.adapter_id == adapter_id,
        AdapterVersion.status == READY,
        AdapterVersion.id != than,
    )
    return bool(session.scalar(select(other)))


def live_validation(session: ReadSession, tenant_id: str, version_id: str) -> Job | None:
    """The job that will still decide about a pending version, if there is one."""
    statement = select(Job).where(
        Job.tenant_id == tenant_id,
        Job.kind == VALIDATE_VERSION,
        Job.state.not_in(FINAL),
        Job.cancel_requested.is_(False),
        Job.payload["version_id"].as_string() == version_id,
    )
    return session.scalar(statement.limit(1))


def number_key(at: dt.datetime, number: int) -> tuple[dt.datetime, str]:
    """The cursor key of a listing ordered by number."""
    return at, str(number)
