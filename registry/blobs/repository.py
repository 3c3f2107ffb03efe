"""Queries over blobs. `tenant_id` comes first: a blob of another tenant does not exist, nor one that is being removed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection

from sqlalchemy import Select, and_, delete, exists, func, literal, select, update
from sqlalchemy.exc import IntegrityError

from registry.blobs.models import Blob, BlobReference
from registry.db import ReadSession, WriteSession, utc_now
from registry.inserts import insert, table_of


def get(session: ReadSession, tenant_id: str, sha256: str) -> Blob | None:
    statement = select(Blob).where(Blob.tenant_id == tenant_id, Blob.sha256 == sha256, Blob.deleting_until.is_(None))
    return session.scalar(statement)


def sizes(session: ReadSession, tenant_id: str, digests: Collection[str]) -> dict[str, int]:
    """Bytes by digest, of those that the tenant has."""
    statement = select(Blob.sha256, Blob.size).where(Blob.tenant_id == tenant_id, Blob.sha256.in_(digests), Blob.deleting_until.is_(None))
    return {row.sha256: row.size for row in session.execute(statement)}


def lock(session: WriteSession, tenant_id: str, sha256: str) -> Blob | None:
    """Also one that is being removed."""
    statement = select(Blob).where(Blob.tenant_id == tenant_id, Blob.sha256 == sha256)
    return session.scalar(statement.with_for_update(key_share=True).execution_options(populate_existing=True))


def is_being_removed(session: ReadSession, tenant_id: str, sha256: str) -> bool:
    """By a collector whose time is not up."""
    taken = exists().where(Blob.tenant_id == tenant_id, Blob.sha256 == sha256, Blob.deleting_until > utc_now())
    return bool(session.scalar(select(taken)))


def total_bytes(session: ReadSession, tenant_id: str) -> int:
    """What the tenant's blobs take. One that is being removed counts no more."""
    mine = (Blob.tenant_id == tenant_id, Blob.deleting_until.is_(None))
    return int(session.scalar(select(func.coalesce(func.sum(Blob.size), 0)).where(*mine)) or 0)


def add(session: WriteSession, tenant_id: str, sha256: str, *, size: int) -> bool:
    """False where the row was there, also when another upload of the same bytes won the race."""
    if session.get(Blob, (tenant_id, sha256)) is not None:
        return False
    try:
        with session.begin_nested():
            session.add(Blob(tenant_id=tenant_id, sha256=sha256, size=size))
    except IntegrityError:
        return False
    return True


def touch(session: WriteSession, blob: Blob) -> None:
    """It was uploaded just now, and whoever was removing it before has no claim on it."""
    own = (Blob.tenant_id == blob.tenant_id, Blob.sha256 == blob.sha256)
    values = {"touched_at": utc_now(), "deleting_until": None, "deleting_by": None}
    session.execute(update(Blob).where(*own).values(**values), execution_options={"synchronize_session": False})


def hold(session: WriteSession, tenant_id: str, owner_id: str, digests: Collection[str]) -> set[str]:
    """Add references to the blobs that are there, and return their digests; those that the owner had are not among them.

    The blobs are kept until the transaction ends. In order, so that owners never wait in a ring.
    """
    there = _there(tenant_id, digests).add_columns(literal(tenant_id), literal(owner_id))
    columns = [BlobReference.sha256, BlobReference.tenant_id, BlobReference.owner_id]
    added = insert(session, BlobReference).from_select(columns, there).on_conflict_do_nothing().returning(table_of(BlobReference).c.sha256)
    return set(session.scalars(added))


def lock_for_owner(session: WriteSession, tenant_id: str, digests: Collection[str]) -> set[str]:
    """Those of the digests that are there, kept likewise."""
    return set(session.scalars(_there(tenant_id, digests)))


def refer(session: WriteSession, tenant_id: str, owner_id: str, digests: Collection[str]) -> None:
    """Add the references that the owner lacks, also to blobs that are lost. Call under the lock of the owner."""
    rows = [{"tenant_id": tenant_id, "sha256": sha256, "owner_id": owner_id} for sha256 in sorted(digests)]
    if rows:
        session.execute(insert(session, BlobReference).on_conflict_do_nothing(), rows)


def _there(tenant_id: str, digests: Collection[str]) -> Select[str]:
    return (
        select(Blob.sha256)
        .where(Blob.tenant_id == tenant_id, Blob.sha256.in_(digests), Blob.deleting_until.is_(None))
        .order_by(Blob.sha256)
        .with_for_update(read=True, key_share=True)
    )


def let_go(session: WriteSession, tenant_id: str, owner_id: str, *, touched_at: dt.datetime) -> None:
    """Take the owner's references away; its blobs count as touched at that time."""
    own = and_(BlobReference.tenant_id == tenant_id, BlobReference.owner_id == owner_id)
    blobs = and_(Blob.tenant_id == tenant_id, Blob.sha256.in_(select(BlobReference.sha256).where(own)))
    session.scalars(select(Blob.sha256).where(blobs).order_by(Blob.sha256).with_for_update(key_share=True)).all()  # in order, as above
    options = {"synchronize_session": False}
    session.execute(update(Blob).where(blobs).values(touched_at=touched_at), execution_options=options)
    session.execute(delete(BlobReference).where(own), execution_options=options)
