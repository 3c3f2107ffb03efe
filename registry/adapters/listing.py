"""Queries that show adapters: each with the number of its versions and its aliases, all of a page in one statement."""

from __future__ import annotations

import datetime as dt
from typing import Any, NamedTuple

from sqlalchemy import JSON, Row, ScalarSelect, Select, func, select, type_coerce

from registry.adapters.models import DELETED, Adapter, AdapterVersion, Alias
from registry.adapters.search import ANYTHING, Search, matching
from registry.base_models.models import BaseModelRevision
from registry.db import ReadSession
from registry.pagination import after_cursor
from registry.tenants.limits import Prefixes, name_within


class Described(NamedTuple):
    """An adapter as it is shown. `num_versions` and `latest_version` are of those that live."""

    id: str
    name: str
    base_model: str
    description: str
    tags: list[str]
    num_versions: int
    latest_version: int | None
    aliases: dict[str, int]
    created_at: dt.datetime
    updated_at: dt.datetime
    deleted_at: dt.datetime | None


def page(
    session: ReadSession,
    tenant_id: str,
    *,
    cursor: str | None,
    limit: int,
    search: Search = ANYTHING,
    prefixes: Prefixes = None,
    with_deleted: bool = False,
) -> list[Described]:
    """Newest first, one more than `limit`."""
    statement = _described(session, tenant_id).where(*matching(tenant_id, search))
    if prefixes is not None:
        statement = statement.where(name_within(Adapter.name, prefixes))
    if not with_deleted:
        statement = statement.where(Adapter.deleted_at.is_(None))
    statement = after_cursor(statement, cursor, at=Adapter.created_at, row_id=Adapter.id, limit=limit)
    return [_as_shown(row) for row in session.execute(statement)]


def one(session: ReadSession, adapter: Adapter) -> Described:
    return _as_shown(session.execute(_described(session, adapter.tenant_id).where(Adapter.id == adapter.id)).one())


def _described(session: ReadSession, tenant_id: str) -> Select[*tuple[Any, ...]]:
    living = (AdapterVersion.tenant_id == tenant_id, AdapterVersion.adapter_id == Adapter.id, AdapterVersion.status != DELETED)
    return (
        select(
            Adapter.id,
            Adapter.name,
            BaseModelRevision.name,
            Adapter.description,
            Adapter.tags,
            select(func.count()).select_from(AdapterVersion).where(*living).scalar_subquery(),
            select(func.max(AdapterVersion.number)).where(*living).scalar_subquery(),
            _aliases(session, tenant_id),
            Adapter.created_at,
            Adapter.updated_at,
            Adapter.deleted_at,
        )
        .join(BaseModelRevision, BaseModelRevision.id == Adapter.base_model_id)
        .where(Adapter.tenant_id == tenant_id)
    )


def _aliases(session: ReadSession, tenant_id: str) -> ScalarSelect[Any]:
    """{alias: number}; NULL for none on PostgreSQL."""
    gathered = func.json_object_agg if session.get_bind().dialect.name == "postgresql" else func.json_group_object
    return (
        select(type_coerce(gathered(Alias.name, AdapterVersion.number), JSON()))
        .join_from(Alias, AdapterVersion, AdapterVersion.id == Alias.version_id)
        .where(Alias.tenant_id == tenant_id, Alias.adapter_id == Adapter.id)
        .correlate(Adapter)
        .scalar_subquery()
    )


def _as_shown(row: Row[*tuple[Any, ...]]) -> Described:
    *before, aliases, created_at, updated_at, deleted_at = row
    return Described._make((*before, dict(sorted((aliases or {}).items())), created_at, updated_at, deleted_at))
