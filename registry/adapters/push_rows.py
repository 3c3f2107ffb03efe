"""Statements of the push, which is the write that clients wait for most: rows instead of objects, and few round trips."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import exists, func, select

from registry.adapters.models import PENDING, Adapter, AdapterVersion
from registry.artifact.gate import Accepted
from registry.artifact.manifest import VersionManifest
from registry.base_models.models import BaseModelRevision
from registry.blobs.models import Blob
from registry.db import ReadSession, WriteSession
from registry.inserts import insert, table_of
from registry.quotas.models import Quota
from registry.signing.models import SigningPolicy


class LockedAdapter(NamedTuple):
    """`is_base_model`: a base model has this name. `base_model_exists`: the one that was pushed for is still there."""

    id: str
    base_model_id: str
    deleted_at: dt.datetime | None
    is_base_model: bool
    base_model_exists: bool


class NewVersion(NamedTuple):
    id: str
    number: int
    created_at: dt.datetime


def uploaded(session: ReadSession, tenant_id: str, digests: Collection[str]) -> Sequence[Any]:
    """(sha256, size) of those blobs that the tenant has, each beside the tenant's signing policy and stocks' quota."""
    quota, policy = Quota.tenant_id == Blob.tenant_id, SigningPolicy.tenant_id == Blob.tenant_id
    statement = select(Blob.sha256, Blob.size, SigningPolicy.policy, SigningPolicy.floor, Quota.adapters, Quota.versions_per_day)
    mine = statement.where(Blob.tenant_id == tenant_id, Blob.sha256.in_(digests), Blob.deleting_until.is_(None))
    return session.execute(mine.outerjoin(SigningPolicy, policy).outerjoin(Quota, quota)).all()


def lock_adapter(session: WriteSession, tenant_id: str, name: str, *, base_model_id: str) -> LockedAdapter | None:
    """`repository.lock_adapter` by name, deleted ones too, along with what must hold of base models."""
    statement = select(
        Adapter.id,
        Adapter.base_model_id,
        Adapter.deleted_at,
        exists().where(BaseModelRevision.name == name),
        exists().where(BaseModelRevision.id == base_model_id),
    )
    mine = statement.where(Adapter.tenant_id == tenant_id, Adapter.name == name).with_for_update(of=Adapter)
    found = session.execute(mine).one_or_none()
    return None if found is None else LockedAdapter(*found)


def add_adapter(session: WriteSession, adapter: Adapter) -> bool:
    """False where another push made one of this name a moment ago."""
    names = ("id", "tenant_id", "name", "base_model_id", "description", "tags")
    added = insert(session, Adapter).values({name: getattr(adapter, name) for name in names})
    once = added.on_conflict_do_nothing(index_elements=["tenant_id", "name"]).returning(table_of(Adapter).c.id)
    return session.scalar(once) is not None


def add_version(
    session: WriteSession,
    tenant_id: str,
    adapter_id: str,
    *,
    manifest: VersionManifest,
    accepted: Accepted,
    base_model_id: str,
    created_by: str,
) -> NewVersion | None:
    """A pending version with the next number; None where the adapter has these bytes already. Only under `lock_adapter`.

    The lock is a statement before this one, so that this one sees what others did under it. Rows are never removed, so
    numbers have no gaps and mean one thing for ever.
    """
    number = select(func.coalesce(func.max(AdapterVersion.number), 0) + 1).where(
        AdapterVersion.tenant_id == tenant_id, AdapterVersion.adapter_id == adapter_id
    )
    values = {
        "id": uuid4().hex,
        "tenant_id": tenant_id,
        "adapter_id": adapter_id,
        "number": number.scalar_subquery(),
        "version_digest": manifest.digest,
        "status": PENDING,
        "base_model_id": base_model_id,
        "manifest": manifest.to_json(),
        "rank": accepted.rank,
        "targets": list(accepted.targets),
        "num_params": accepted.num_params,
        "size_bytes": manifest.size_bytes,
        "created_by": created_by,
    }
    columns = table_of(AdapterVersion).c
    once = (
        insert(session, AdapterVersion)
        .values(values)
        .on_conflict_do_nothing(index_elements=["adapter_id", "version_digest", "base_model_id"])
    )
    made = session.execute(once.returning(columns.id, columns.number, columns.created_at)).one_or_none()
    return None if made is None else NewVersion(*made)
