"""Rules of uploads in parts. The store is spoken to between transactions, never inside one.

Bytes first: a row names a handle that the store has given; a blob's row appears when the finaliser has hashed and
placed its bytes. What a crash leaves in the store belongs to no row, and the store's stale clean-up takes it.
"""

from __future__ import annotations

import datetime as dt
from uuid import uuid4

from sqlalchemy.exc import IntegrityError

from registry.audit import service as audit
from registry.blobs import service as blobs
from registry.blobs.store import BlobStore, PartedUpload
from registry.config import Settings
from registry.db import Database, ReadSession, WriteSession, database_time
from registry.errors import Conflict, Invalid, NotFound, QuotaExceeded, TooLarge
from registry.jobs import service as jobs
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.tenants.auth import Subject, TenantSubject
from registry.uploads import repository
from registry.uploads.models import ABORTED, DONE, EXPIRED, FINALISING, OPEN, REJECTED, LargeUpload

MAX_PARTS = 10_000

quotas.measure(Measure.BYTES, repository.reserved_bytes, reserved=True)


class UploadMissing(NotFound):
    code = "upload_missing"

    def __init__(self, upload_id: str) -> None:
        super().__init__(
            f"there is no upload {upload_id}; begin one first", field="upload_id", value=upload_id, remedy="POST /api/v1/uploads"
        )


def begin(
    database: Database, store: BlobStore, subject: TenantSubject, *, sha256: str, size: int, settings: Settings
) -> tuple[LargeUpload, bool]:
    """The tenant's live upload of this digest, or a new one (True), whose bytes then count against the quota.

    Raises TooLarge, Conflict and QuotaExceeded.
    """
    _refuse_size(size, settings)
    defaults = quotas.defaults_of(settings)
    expire(database, store, subject.tenant_id)
    with database.read() as session:
        found = repository.live(session, subject.tenant_id, sha256)
        if found is None:
            _refuse_too_many(session, subject.tenant_id, settings)
            quotas.require_room(session, subject.tenant_id, Measure.BYTES, size, defaults=defaults)
    if found is not None:
        return _same_size(found, size), False
    upload_id = uuid4().hex
    handle = store.begin_parts(subject.tenant_id, upload_id)
    parted = PartedUpload(subject.tenant_id, upload_id, handle, size, settings.upload_part_bytes)
    try:
        with database.write() as session:
            quotas.allowance(session, subject.tenant_id, Measure.BYTES, defaults=defaults).spend(session, Measure.BYTES, size)
            return _add(session, subject, parted, sha256=sha256, ttl_s=settings.upload_ttl_s), True
    except QuotaExceeded:  # another one was recorded since we looked
        store.discard_parts(parted)
        raise
    except IntegrityError:  # somebody else began the same one at the same moment
        store.discard_parts(parted)
        with database.read() as session:
            found = repository.live(session, subject.tenant_id, sha256)
        if found is None:
            raise
        return _same_size(found, size), False


def get(session: ReadSession, tenant_id: str, upload_id: str) -> LargeUpload:
    """Raises UploadMissing."""
    upload = repository.get(session, tenant_id, upload_id)
    if upload is None:
        raise UploadMissing(upload_id)
    return upload


def get_open(session: ReadSession, tenant_id: str, upload_id: str) -> LargeUpload:
    """Raises UploadMissing, and Conflict for one that takes no parts any more."""
    upload = get(session, tenant_id, upload_id)
    _must_be_open(session, upload)
    return upload


def part_size(upload: LargeUpload, number: int) -> int:
    """Raises Invalid for a number beyond the last part."""
    last = upload.parted.num_parts
    if number > last:
        raise Invalid(
            f"the upload has {last} parts, not {number}; send the parts 1 to {last}", field="number", value=number, remedy=f"1 to {last}"
        )
    return upload.parted.size_of(number)


def require_whole(upload: LargeUpload, parts: dict[int, int]) -> None:
    """Raises Conflict that names the parts which are absent or have another size than theirs."""
    parted = upload.parted
    wrong = [number for number in range(1, parted.num_parts + 1) if parts.get(number) != parted.size_of(number)]
    wrong += sorted(number for number in parts if number > parted.num_parts)
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (" ..." if len(wrong) > 10 else "")
        raise Conflict(
            f"{len(wrong)} of {parted.num_parts} parts are absent or have a wrong size: {shown}; send them, then complete again",
            field="parts",
            value=shown,
            remedy=f"GET /api/v1/uploads/{upload.id} lists what has arrived",
            code="parts_missing",
        )


def start_finalising(session: WriteSession, subject: TenantSubject, upload_id: str) -> LargeUpload:
    """open -> finalising, with the job that does it. Again: the same answer."""
    upload = _lock(session, subject.tenant_id, upload_id)
    if upload.state in (FINALISING, DONE, REJECTED):
        return upload
    _must_be_open(session, upload)
    job = jobs.enqueue(
        session,
        kind=jobs.FINALISE_UPLOAD,
        tenant_id=subject.tenant_id,
        subject_id=subject.key_id,
        payload={"upload_id": upload.id},
    )
    _move(session, subject, upload, state=FINALISING)
    upload.job_id = job.id
    session.flush()
    return upload


def abort(session: WriteSession, subject: TenantSubject, upload_id: str) -> LargeUpload:
    """open -> aborted; the caller then discards the parts. Raises Conflict once it is being finalised."""
    upload = _lock(session, subject.tenant_id, upload_id)
    if upload.state in (FINALISING, DONE):
        raise Conflict(f"the upload is {upload.state} and cannot be aborted", field="state", value=upload.state)
    if upload.state == OPEN:
        _move(session, subject, upload, state=ABORTED)
    return upload


def publish_done(session: WriteSession, tenant_id: str, upload_id: str) -> str:
    """finalising -> done, with the blob's row; returns the state that it then has."""
    upload = _lock(session, tenant_id, upload_id)
    if upload.state == FINALISING:
        subject = _owner(upload)
        blobs.record_upload(session, subject, upload.sha256, size=upload.size, defaults=None)
        _move(session, subject, upload, state=DONE)
    return upload.state


def publish_rejected(session: WriteSession, tenant_id: str, upload_id: str, *, code: str, detail: str) -> str:
    """finalising -> rejected; returns the state that it then has."""
    upload = _lock(session, tenant_id, upload_id)
    if upload.state == FINALISING:
        upload.reason = {"code": code, "detail": detail}
        _move(session, _owner(upload), upload, state=REJECTED)
    return upload.state


def expire(database: Database, store: BlobStore, tenant_id: str) -> None:
    """End the tenant's uploads whose time is over, and remove their parts."""
    with database.read() as session:
        late = [upload.id for upload in repository.overdue(session, tenant_id)]
    for upload_id in late:
        end_late(database, store, tenant_id, upload_id)


def end_late(database: Database, store: BlobStore, tenant_id: str, upload_id: str) -> bool:
    """open -> expired, and its parts removed. False where it was not open any more."""
    with database.write() as session:
        upload = _lock(session, tenant_id, upload_id)
        parted, was_open = upload.parted, upload.state == OPEN
        if was_open:
            _move(session, _owner(upload), upload, state=EXPIRED)
    if was_open:
        store.discard_parts(parted)
    return was_open


def _add(session: WriteSession, subject: TenantSubject, parted: PartedUpload, *, sha256: str, ttl_s: float) -> LargeUpload:
    upload = LargeUpload(
        id=parted.upload_id,
        tenant_id=parted.tenant_id,
        sha256=sha256,
        size=parted.size,
        part_bytes=parted.part_bytes,
        handle=parted.handle,
        created_by=subject.key_id,
        expires_at=database_time(session) + dt.timedelta(seconds=ttl_s),
    )
    session.add(upload)
    session.flush()
    session.refresh(upload)
    after = {"sha256": sha256, "size": parted.size}
    audit.record(session, subject, "upload.begun", "upload", upload.id, after=after, tenant_id=upload.tenant_id)
    return upload


def _lock(session: WriteSession, tenant_id: str, upload_id: str) -> LargeUpload:
    upload = repository.lock(session, tenant_id, upload_id)
    if upload is None:
        raise UploadMissing(upload_id)
    return upload


def _move(session: WriteSession, subject: Subject, upload: LargeUpload, *, state: str) -> None:
    before, upload.state = upload.state, state
    session.flush()
    audit.record(
        session,
        subject,
        f"upload.{state}",
        "upload",
        upload.id,
        before={"state": before},
        after={"state": state},
        tenant_id=upload.tenant_id,
    )


def _owner(upload: LargeUpload) -> TenantSubject:
    """Who began it: what a job does later is done for that key."""
    return TenantSubject(key_id=upload.created_by, tenant_id=upload.tenant_id, tenant="", scopes=frozenset())


def _must_be_open(session: ReadSession, upload: LargeUpload) -> None:
    state = EXPIRED if upload.state == OPEN and upload.expires_at <= database_time(session) else upload.state
    if state != OPEN:
        raise Conflict(
            f"the upload is {state} and takes nothing any more; begin it again",
            field="state",
            value=state,
            remedy="POST /api/v1/uploads",
            code="upload_not_open",
        )


def _same_size(upload: LargeUpload, size: int) -> LargeUpload:
    if upload.size != size:
        raise Conflict(
            f"an upload of these bytes is open with size {upload.size}, not {size}; abort it or send its size",
            field="size",
            value=size,
            remedy=f"DELETE /api/v1/uploads/{upload.id}",
        )
    return upload


def _refuse_size(size: int, settings: Settings) -> None:
    allowed = min(settings.max_upload_bytes, MAX_PARTS * settings.upload_part_bytes)
    if size > allowed:
        raise TooLarge(
            f"size {size} is over the {allowed} bytes that an upload may have",
            field="size",
            value=size,
            remedy=f"stay within {allowed} bytes",
        )


def _refuse_too_many(session: ReadSession, tenant_id: str, settings: Settings) -> None:
    if repository.count_live(session, tenant_id) >= settings.max_open_uploads:
        raise Conflict(
            f"the tenant has {settings.max_open_uploads} uploads open; complete or abort some first",
            field="uploads",
            value=settings.max_open_uploads,
            remedy="GET /api/v1/uploads lists them; DELETE /api/v1/uploads/{id} aborts one",
            code="too_many_uploads",
        )
