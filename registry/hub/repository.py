"""Queries behind the Hub's revisions: only ready versions of living adapters. `tenant_id` comes first."""

from __future__ import annotations

from sqlalchemy import Select, select
from sqlalchemy.orm import joinedload

from registry.adapters.models import READY, AdapterVersion, Alias
from registry.db import ReadSession


def _ready(tenant_id: str, adapter_id: str) -> Select[AdapterVersion]:
    return (
        select(AdapterVersion)
        .where(AdapterVersion.tenant_id == tenant_id, AdapterVersion.adapter_id == adapter_id, AdapterVersion.status == READY)
        .options(joinedload(AdapterVersion.base_model), joinedload(AdapterVersion.adapter))
    )


def by_number(session: ReadSession, tenant_id: str, adapter_id: str, number: int) -> AdapterVersion | None:
    return session.scalar(_ready(tenant_id, adapter_id).where(AdapterVersion.number == number))


def by_alias(session: ReadSession, tenant_id: str, adapter_id: str, alias: str) -> AdapterVersion | None:
    pointed = Alias.version_id == AdapterVersion.id
    mine = (Alias.tenant_id == tenant_id, Alias.adapter_id == adapter_id, Alias.name == alias)
    return session.scalar(_ready(tenant_id, adapter_id).join(Alias, pointed).where(*mine))


def by_digest(session: ReadSession, tenant_id: str, adapter_id: str, prefix: str) -> AdapterVersion | None:
    """`prefix`: 40 or 64 hex digits. The same bytes for two base models are two versions with the same files: the later one."""
    statement = _ready(tenant_id, adapter_id).where(AdapterVersion.version_digest.startswith(prefix))
    return session.scalar(statement.order_by(AdapterVersion.number.desc()).limit(1))
