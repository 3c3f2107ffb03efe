"""Queries over signing keys and policies. `tenant_id` comes first."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, or_, select

from registry.db import ReadSession, WriteSession
from registry.signing.models import SigningKey, SigningPolicy


def list_keys(session: ReadSession, tenant_id: str) -> Sequence[SigningKey]:
    """By name, revoked ones too; there are few (`service.MAX_KEYS`)."""
    return session.scalars(select(SigningKey).where(SigningKey.tenant_id == tenant_id).order_by(SigningKey.name)).all()


def find(session: ReadSession, tenant_id: str, name: str) -> SigningKey | None:
    return session.scalar(select(SigningKey).where(SigningKey.tenant_id == tenant_id, SigningKey.name == name))


def twin(session: ReadSession, tenant_id: str, *, name: str, fingerprint: str) -> SigningKey | None:
    """A key with that name or that fingerprint."""
    same = or_(SigningKey.name == name, SigningKey.fingerprint == fingerprint)
    return session.scalar(select(SigningKey).where(SigningKey.tenant_id == tenant_id, same).limit(1))


def lock(session: WriteSession, tenant_id: str, key_id: str) -> SigningKey:
    """For whoever relies on it: it is not revoked before this transaction ends. (SQLite has one writer anyway.)"""
    statement = select(SigningKey).where(SigningKey.tenant_id == tenant_id, SigningKey.id == key_id).with_for_update(read=True)
    locked = session.scalar(statement.execution_options(populate_existing=True))
    assert locked is not None, f"signing key {key_id} was read a moment ago and rows are never removed"
    return locked


def count(session: ReadSession, tenant_id: str) -> int:
    return session.scalar(select(func.count()).select_from(SigningKey).where(SigningKey.tenant_id == tenant_id)) or 0


def policy(session: ReadSession, tenant_id: str) -> SigningPolicy | None:
    return session.get(SigningPolicy, tenant_id)
