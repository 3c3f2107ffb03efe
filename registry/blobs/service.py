"""Rules of blobs: bytes first, then the row that promises them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection

import structlog

from registry.audit import service as audit
from registry.blobs import repository
from registry.blobs.local import LocalBlobStore
from registry.blobs.models import Blob
from registry.blobs.store import STALE_UPLOAD_S, BlobMissing, BlobStore
from registry.config import Settings
from registry.db import Database, ReadSession, WriteSession, database_time
from registry.errors import RegistryError, Unavailable
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import Limits
from registry.tenants.auth import SYSTEM, TenantSubject

log = structlog.get_logger(__name__)

quotas.measure(Measure.BYTES, repository.total_bytes)

RETRY_REMOVED_S = 2


def open_blob_store(settings: Settings) -> BlobStore:
    """The store that the settings ask for. Raises ValueError for a URL that names no bucket."""
    if settings.blob_url:
        from registry.blobs.s3 import S3BlobStore  # noqa: PLC0415 - boto3 takes half a second to import

        return S3BlobStore(settings.blob_url, settings.s3)
    return LocalBlobStore(settings.blob_dir)


def remove_stale_uploads(store: BlobStore, *, ttl_s: float) -> None:
    """Take away what killed processes left behind. A store that is away does not keep a worker from starting."""
    try:
        removed = store.remove_stale_uploads(older_than_s=max(STALE_UPLOAD_S, 2 * ttl_s))
    except RegistryError as error:
        log.warning("blob_store.not_swept", error=error.detail)
        return
    if removed:
        log.info("blob_store.swept", removed=removed)


def keep_upload(
    database: Database, store: BlobStore, subject: TenantSubject, sha256: str, *, size: int, defaults: Limits
) -> tuple[Blob, bool]:
    """Record bytes that are in the store now. True where the tenant did not have them before. No transaction may be open.

    Bytes that lay there before, as garbage, may have been on their way out: then nothing is promised. Raises Unavailable, and
    QuotaExceeded as `record_upload`.
    """
    with database.write() as session:
        added = record_upload(session, subject, sha256, size=size, defaults=defaults)
        blob = get(session, subject.tenant_id, sha256)
    if added and store.size(subject.tenant_id, sha256) != size:
        with database.write() as session:
            forget(session, subject.tenant_id, sha256)
        raise being_removed(sha256)
    return blob, added


def record_upload(session: WriteSession, subject: TenantSubject, sha256: str, *, size: int, defaults: Limits | None) -> bool:
    """Called after the bytes are durable. True where the tenant did not have them before.

    Raises QuotaExceeded under the tenant's quota, or `defaults` (None: they were reserved before, and count already), and
    Unavailable while the GC removes what lay there.
    """
    if repository.get(session, subject.tenant_id, sha256) is None and _add(session, subject, sha256, size=size, defaults=defaults):
        audit.record(session, subject, "blob.created", "blob", sha256, after={"size": size}, tenant_id=subject.tenant_id)
        return True
    blob = repository.lock(session, subject.tenant_id, sha256)
    if blob is None or (blob.deleting_until is not None and blob.deleting_until > database_time(session)):
        raise being_removed(sha256)
    repository.touch(session, blob)
    return blob.deleting_until is not None  # by a collector that died: it is ours now


def hold(session: WriteSession, tenant_id: str, owner_id: str, digests: Collection[str]) -> None:
    """The owner needs these blobs from now on, and the GC leaves them alone. Raises BlobMissing for one that is not there."""
    rest = set(digests) - repository.hold(session, tenant_id, owner_id, digests)
    missing = sorted(rest - repository.lock_for_owner(session, tenant_id, rest)) if rest else []
    if missing:
        raise BlobMissing(missing[0])


def let_go(session: WriteSession, tenant_id: str, owner_id: str, *, settings: Settings) -> None:
    """The owner needs none of its blobs any more: the GC may take those that nobody else needs, once `gc_hold_s` is over."""
    touched_at = database_time(session) - dt.timedelta(seconds=settings.gc_grace_s - settings.gc_hold_s)
    repository.let_go(session, tenant_id, owner_id, touched_at=touched_at)


def being_removed(sha256: str) -> Unavailable:
    return Unavailable(
        f"blob {sha256} was garbage and is being removed at this moment; upload it again",
        field="sha256",
        value=sha256,
        remedy="upload it again in a moment",
        retry_after_s=RETRY_REMOVED_S,
        code="blob_being_removed",
    )


def _add(session: WriteSession, subject: TenantSubject, sha256: str, *, size: int, defaults: Limits | None) -> bool:
    """False where another upload of the same bytes was recorded while this one waited for a lock, or a row is in the way."""
    if defaults is not None:
        allowance = quotas.allowance(session, subject.tenant_id, Measure.BYTES, defaults=defaults)
        if repository.sizes(session, subject.tenant_id, [sha256]):
            return False
        allowance.spend(session, Measure.BYTES, size)
    return repository.add(session, subject.tenant_id, sha256, size=size)


def forget(session: WriteSession, tenant_id: str, sha256: str) -> None:
    """Take back the promise of a row whose bytes turned out damaged or gone, so that the tenant uploads them again."""
    blob = repository.get(session, tenant_id, sha256)
    if blob is not None:
        session.delete(blob)
        audit.record(session, SYSTEM, "blob.forgotten", "blob", sha256, before={"size": blob.size}, tenant_id=tenant_id)


def get(session: ReadSession, tenant_id: str, sha256: str) -> Blob:
    """Raises BlobMissing."""
    blob = repository.get(session, tenant_id, sha256)
    if blob is None:
        raise BlobMissing(sha256)
    return blob
