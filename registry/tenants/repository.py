"""Queries over tenants and API keys."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, bindparam, case, func, null, select, update

from registry.db import ReadSession, WriteSession, utc_now
from registry.pagination import after_cursor
from registry.tenants.models import ApiKey, Tenant


@dataclass(frozen=True)
class StoredKey:
    """What one query says about a key. `refusal` is None for a key that is good now, by the database's clock."""

    token_hmac: str
    tenant_id: str | None
    tenant: str | None
    scopes: list[str]
    adapter_prefixes: list[str] | None
    expires_at: dt.datetime | None
    refusal: str | None


def _authentication() -> Select[*tuple[Any, ...]]:
    refusal = case(
        (ApiKey.revoked_at.is_not(None), "revoked"),
        (Tenant.deleted_at.is_not(None), "tenant_deleted"),
        (and_(ApiKey.expires_at.is_not(None), ApiKey.expires_at <= utc_now()), "expired"),
        else_=null(),
    )
    return (
        select(ApiKey.token_hmac, ApiKey.tenant_id, Tenant.name, ApiKey.scopes, ApiKey.adapter_prefixes, ApiKey.expires_at, refusal)
        .join_from(ApiKey, Tenant, ApiKey.tenant_id == Tenant.id, isouter=True)
        .where(ApiKey.id == bindparam("key_id"))
    )


_AUTHENTICATION = _authentication()  # once: every request runs it, and composing it costs more than running it


def key_for_authentication(session: ReadSession, key_id: str) -> StoredKey | None:
    rows = session.select_alone(_AUTHENTICATION, {"key_id": key_id})
    return StoredKey(*rows[0]) if rows else None


def tenant_by_name(session: ReadSession, name: str, *, include_deleted: bool = False) -> Tenant | None:
    statement = select(Tenant).where(Tenant.name == name)
    return session.scalar(statement if include_deleted else statement.where(Tenant.deleted_at.is_(None)))


def list_tenants(session: ReadSession, *, limit: int, cursor: str | None, with_deleted: bool = False) -> Sequence[Tenant]:
    statement = select(Tenant) if with_deleted else select(Tenant).where(Tenant.deleted_at.is_(None))
    return session.scalars(after_cursor(statement, cursor, at=Tenant.created_at, row_id=Tenant.id, limit=limit)).all()


def find_key(session: ReadSession, tenant_id: str | None, key_id: str) -> ApiKey | None:
    """`tenant_id` None finds keys of every tenant and of none: for admins alone."""
    statement = select(ApiKey).where(ApiKey.id == key_id)
    return session.scalar(statement if tenant_id is None else statement.where(ApiKey.tenant_id == tenant_id))


def lock_key(session: WriteSession, key_id: str) -> ApiKey:
    """The row as it is now: two rotations of one key come one after the other."""
    return session.scalars(select(ApiKey).where(ApiKey.id == key_id).with_for_update().execution_options(populate_existing=True)).one()


def list_keys(session: ReadSession, tenant_id: str | None, *, limit: int, cursor: str | None) -> Sequence[tuple[ApiKey, str | None]]:
    """Keys with their tenants' names. `tenant_id` None lists every key: for admins alone."""
    statement = select(ApiKey, Tenant.name).join_from(ApiKey, Tenant, ApiKey.tenant_id == Tenant.id, isouter=True)
    if tenant_id is not None:
        statement = statement.where(ApiKey.tenant_id == tenant_id)
    rows = session.execute(after_cursor(statement, cursor, at=ApiKey.created_at, row_id=ApiKey.id, limit=limit))
    return [(key, name) for key, name in rows]


def any_key(session: ReadSession) -> bool:
    return bool(session.scalar(select(func.count()).select_from(ApiKey)))


def touch_keys(session: WriteSession, key_ids: Collection[str]) -> None:
    session.execute(update(ApiKey).where(ApiKey.id.in_(key_ids)).values(last_used_at=utc_now()))
