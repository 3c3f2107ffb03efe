"""Queries over adapters, versions, forms and aliases. `tenant_id` comes first: another tenant's row does not exist."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Select, exists, func, literal, select
from sqlalchemy.orm import joinedload, selectinload

from registry.adapters.models import DELETED, READY, Adapter, AdapterVersion, Alias, AliasMove, VersionSignature
from registry.adapters.search import ANYTHING, Search, matching
from registry.db import ReadSession, UtcDateTime, WriteSession
from registry.jobs.models import FINAL, Job
from registry.jobs.service import VALIDATE_VERSION
from registry.pagination import after_cursor, decode_cursor
from registry.quotas.service import day_start
from registry.tenants.limits import Prefixes, name_within


@dataclass(frozen=True)
class VersionCount:
    num_versions: int = 0
    latest: int | None = None


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


def lock_adapter(session: WriteSession, tenant_id: str, adapter_id: str) -> Adapter:
    """Versions, aliases and deletion of one adapter change one after the other. (SQLite has one writer anyway.)"""
    statement = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.id == adapter_id).with_for_update()
    locked = session.scalar(statement.execution_options(populate_existing=True))
    assert locked is not None, f"adapter {adapter_id} was read in this transaction and rows are never removed"
    return locked


def adapters_page(
    session: ReadSession,
    tenant_id: str,
    *,
    cursor: str | None,
    limit: int,
    search: Search = ANYTHING,
    prefixes: Prefixes = None,
    with_deleted: bool = False,
) -> Sequence[Adapter]:
    statement = select(Adapter).where(Adapter.tenant_id == tenant_id, *matching(tenant_id, search)).options(joinedload(Adapter.base_model))
    if prefixes is not None:
        statement = statement.where(name_within(Adapter.name, prefixes))
    if not with_deleted:
        statement = statement.where(Adapter.deleted_at.is_(None))
    return session.scalars(after_cursor(statement, cursor, at=Adapter.created_at, row_id=Adapter.id, limit=limit)).all()


def version_counts(session: ReadSession, tenant_id: str, adapter_ids: Collection[str]) -> dict[str, VersionCount]:
    """Living versions by adapter; an adapter without one is absent."""
    statement = (
        select(AdapterVersion.adapter_id, func.count(), func.max(AdapterVersion.number))
        .where(AdapterVersion.tenant_id == tenant_id, AdapterVersion.adapter_id.in_(adapter_ids), AdapterVersion.status != DELETED)
        .group_by(AdapterVersion.adapter_id)
    )
    return {adapter_id: VersionCount(count, latest) for adapter_id, count, latest in session.execute(statement)}


def alias_numbers(session: ReadSession, tenant_id: str, adapter_ids: Collection[str]) -> dict[str, dict[str, int]]:
    """{adapter id: {alias: version number}}"""
    statement = (
        select(Alias.adapter_id, Alias.name, AdapterVersion.number)
        .join(Alias.version)
        .where(Alias.tenant_id == tenant_id, Alias.adapter_id.in_(adapter_ids))
        .order_by(Alias.name)
    )
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for adapter_id, name, number in session.execute(statement):
        found[adapter_id][name] = number
    return found


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
        statement = statement.where(AdapterVersion.number < _number_of(cursor))
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


def alias(session: ReadSession, tenant_id: str, adapter_id: str, name: str) -> Alias | None:
    statement = select(Alias).where(Alias.tenant_id == tenant_id, Alias.adapter_id == adapter_id, Alias.name == name)
    return session.scalar(statement.options(joinedload(Alias.version)))


def aliases(session: ReadSession, tenant_id: str, adapter_id: str, *, version_id: str | None = None) -> Sequence[Alias]:
    """Of an adapter, or of one of its versions."""
    statement = select(Alias).where(Alias.tenant_id == tenant_id, Alias.adapter_id == adapter_id)
    if version_id is not None:
        statement = statement.where(Alias.version_id == version_id)
    return session.scalars(statement.options(joinedload(Alias.version)).order_by(Alias.name)).all()


def last_generation(session: ReadSession, tenant_id: str, adapter_id: str, name: str) -> int:
    """0 where the alias never was. Goes on counting after a removal, so that an old ETag never matches again."""
    statement = select(func.max(AliasMove.generation)).where(
        AliasMove.tenant_id == tenant_id, AliasMove.adapter_id == adapter_id, AliasMove.name == name
    )
    return session.scalar(statement) or 0


def moves_page(session: ReadSession, tenant_id: str, adapter_id: str, name: str, *, cursor: str | None, limit: int) -> Sequence[AliasMove]:
    statement = select(AliasMove).where(AliasMove.tenant_id == tenant_id, AliasMove.adapter_id == adapter_id, AliasMove.name == name)
    if cursor is not None:
        statement = statement.where(AliasMove.generation < _number_of(cursor))
    return session.scalars(statement.order_by(AliasMove.generation.desc()).limit(limit + 1)).all()


def number_key(at: dt.datetime, number: int) -> tuple[dt.datetime, str]:
    """The cursor key of a listing ordered by number."""
    return at, str(number)


def _number_of(cursor: str) -> int:
    number = decode_cursor(cursor)[1]
    return int(number) if number.isdigit() and len(number) < 10 else 0
