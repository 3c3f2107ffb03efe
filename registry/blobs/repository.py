"""Queries over blobs. `tenant_id` comes first: a blob of another tenant does not exist."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from registry.blobs.models import Blob
from registry.db import ReadSession, WriteSession


def get(session: ReadSession, tenant_id: str, sha256: str) -> Blob | None:
    return session.get(Blob, (tenant_id, sha256))


def sizes(session: ReadSession, tenant_id: str, digests: Collection[str]) -> dict[str, int]:
    """Bytes by digest, of those that the tenant has."""
    rows = session.execute(select(Blob.sha256, Blob.size).where(Blob.tenant_id == tenant_id, Blob.sha256.in_(digests)))
    return {row.sha256: row.size for row in rows}


def total_bytes(session: ReadSession, tenant_id: str) -> int:
    return int(session.scalar(select(func.coalesce(func.sum(Blob.size), 0)).where(Blob.tenant_id == tenant_id)) or 0)


def add(session: WriteSession, tenant_id: str, sha256: str, *, size: int) -> bool:
    """False where the row was there, also when another upload of the same bytes won the race."""
    if get(session, tenant_id, sha256) is not None:
        return False
    try:
        with session.begin_nested():
            session.add(Blob(tenant_id=tenant_id, sha256=sha256, size=size))
    except IntegrityError:
        return False
    return True
