"""Rules of blobs: bytes first, then the row that promises them."""

from __future__ import annotations

import structlog

from registry.audit import service as audit
from registry.blobs import repository
from registry.blobs.local import LocalBlobStore
from registry.blobs.models import Blob
from registry.blobs.store import STALE_UPLOAD_S, BlobMissing, BlobStore
from registry.config import Settings
from registry.db import ReadSession, WriteSession
from registry.errors import RegistryError
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import Limits
from registry.tenants.auth import SYSTEM, TenantSubject

log = structlog.get_logger(__name__)

quotas.measure(Measure.BYTES, repository.total_bytes)


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


def record_upload(session: WriteSession, subject: TenantSubject, sha256: str, *, size: int, defaults: Limits | None) -> bool:
    """Called after the bytes are durable. True where the tenant did not have them before.

    Raises QuotaExceeded under the tenant's quota, or `defaults`; None: they were reserved before, and count already.
    """
    if repository.get(session, subject.tenant_id, sha256) is not None:
        return False
    if defaults is not None and not _spend(session, subject.tenant_id, sha256, size=size, defaults=defaults):
        return False
    added = repository.add(session, subject.tenant_id, sha256, size=size)
    if added:
        audit.record(session, subject, "blob.created", "blob", sha256, after={"size": size}, tenant_id=subject.tenant_id)
    return added


def _spend(session: WriteSession, tenant_id: str, sha256: str, *, size: int, defaults: Limits) -> bool:
    """False where another upload of the same bytes was recorded while this one waited for the lock."""
    allowance = quotas.allowance(session, tenant_id, Measure.BYTES, defaults=defaults)
    if repository.sizes(session, tenant_id, [sha256]):
        return False
    allowance.spend(session, Measure.BYTES, size)
    return True


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
