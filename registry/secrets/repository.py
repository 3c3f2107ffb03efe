"""Queries over secrets."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select

from registry.db import ReadSession
from registry.secrets.models import TenantSecret


def find(session: ReadSession, tenant_id: str, name: str) -> TenantSecret | None:
    return session.scalar(select(TenantSecret).where(TenantSecret.tenant_id == tenant_id, TenantSecret.name == name))


def list_secrets(session: ReadSession, tenant_id: str) -> Sequence[TenantSecret]:
    """By name; there are few (`service.MAX_SECRETS`)."""
    return session.scalars(select(TenantSecret).where(TenantSecret.tenant_id == tenant_id).order_by(TenantSecret.name)).all()


def count(session: ReadSession, tenant_id: str) -> int:
    return session.scalar(select(func.count()).select_from(TenantSecret).where(TenantSecret.tenant_id == tenant_id)) or 0


def everyones(session: ReadSession) -> Sequence[TenantSecret]:
    """Of all tenants: for the operator, who checks and re-seals."""
    return session.scalars(select(TenantSecret).order_by(TenantSecret.id)).all()
