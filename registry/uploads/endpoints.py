"""`/uploads`: a blob above the inline limit, in parts that can be sent again, in any order, at once.

One flow for every store: begin, ask where the parts go, PUT them, complete, watch the state. Whether a part goes
straight to the store or through here is in its URL.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from registry import metrics
from registry.blobs.endpoints import BlobStoreDep, SettingsDep, receive
from registry.blobs.store import PartedUpload
from registry.db import Database, DatabaseDep, ReadSessionDep
from registry.errors import BadRequest, Conflict, Forbidden, Invalid, NotFound, QuotaExceeded, StorageFull, TooLarge, problem_responses
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.tenants.auth import TenantSubject, require
from registry.uploads import repository, service
from registry.uploads.models import OPEN, LargeUpload
from registry.uploads.schemas import (
    PartNumber,
    PartOut,
    PartsIn,
    PartTarget,
    PartTargets,
    UploadId,
    UploadIn,
    UploadOut,
    UploadProgress,
)

router = APIRouter(prefix="/uploads", tags=["blobs"], route_class=Route)

Writer = Annotated[TenantSubject, Depends(require("adapters:write"))]
ERRORS = problem_responses(BadRequest, Forbidden, NotFound, Invalid)


@router.post(
    "",
    status_code=201,
    responses=problem_responses(BadRequest, Forbidden, QuotaExceeded, Invalid, Conflict, TooLarge, StorageFull)
    | {200: {"description": "An upload of these bytes is open: go on with it.", "model": UploadProgress}},
)
def begin_upload(
    wanted: UploadIn, *, response: Response, subject: Writer, store: BlobStoreDep, database: DatabaseDep, settings: SettingsDep
) -> UploadProgress:
    """Begin the upload of one blob, or find the open one of the same bytes with the parts that it has."""
    upload, created = service.begin(database, store, subject, sha256=wanted.sha256, size=wanted.size, settings=settings)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/api/v1/uploads/{upload.id}"
    return _progress(upload, {} if created or upload.state != OPEN else store.parts(upload.parted))


@router.get("", responses=problem_responses(BadRequest, Forbidden, Invalid))
def list_uploads(*, subject: Writer, session: ReadSessionDep, cursor: Cursor = None, limit: Limit = 50) -> Page[UploadOut]:
    """The tenant's uploads, newest first; its own for a key that is limited to some adapters."""
    own = None if subject.adapter_prefixes is None else subject.key_id
    rows = repository.page(session, subject.tenant_id, cursor=cursor, limit=limit, created_by=own)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=_show)


@router.get("/{upload_id}", responses=ERRORS)
def get_upload(upload_id: UploadId, *, subject: Writer, store: BlobStoreDep, database: DatabaseDep) -> UploadProgress:
    """State and, while it is open, the parts that have arrived."""
    service.expire(database, store, subject.tenant_id)
    with database.read() as session:
        upload = service.get(session, subject.tenant_id, upload_id)
    return _progress(upload, store.parts(upload.parted) if upload.state == OPEN else {})


@router.post("/{upload_id}/parts", responses=ERRORS | problem_responses(Conflict))
def locate_parts(
    upload_id: UploadId, wanted: PartsIn, *, subject: Writer, store: BlobStoreDep, database: DatabaseDep, settings: SettingsDep
) -> PartTargets:
    """Where to PUT the parts. URLs of the store are good for a quarter of an hour or as long as it is configured."""
    with database.read() as session:
        upload = service.get_open(session, subject.tenant_id, upload_id)
    return PartTargets(
        items=[
            PartTarget(
                number=number,
                size=service.part_size(upload, number),
                url=store.part_url(upload.parted, number, ttl_s=settings.presigned_ttl_s) or f"/api/v1/uploads/{upload.id}/parts/{number}",
            )
            for number in wanted.numbers
        ]
    )


@router.put("/{upload_id}/parts/{number}", responses=ERRORS | problem_responses(Conflict, TooLarge, StorageFull))
async def put_part(
    upload_id: UploadId, number: PartNumber, *, request: Request, subject: Writer, store: BlobStoreDep, database: DatabaseDep
) -> PartOut:
    """One part through the API, whole or not at all. Sent again, the last one counts."""
    parted = await run_in_threadpool(_open_part, database, subject.tenant_id, upload_id, number)
    part = await run_in_threadpool(store.begin_part, parted, number)
    try:
        await receive(request, part)
        size = await run_in_threadpool(part.commit)
    finally:
        part.abort()
    metrics.blob_bytes.labels("in").inc(size)
    return PartOut(number=number, size=size)


@router.post("/{upload_id}/complete", status_code=202, responses=ERRORS | problem_responses(Conflict))
def complete_upload(upload_id: UploadId, *, subject: Writer, store: BlobStoreDep, database: DatabaseDep) -> UploadOut:
    """All parts are there: a job hashes them and places the blob. 409 names the parts that are absent. Asked again, the same answer."""
    with database.read() as session:
        upload = service.get(session, subject.tenant_id, upload_id)
    if upload.state == OPEN:
        service.require_whole(upload, store.parts(upload.parted))
    with database.write() as session:
        return _show(service.start_finalising(session, subject, upload_id))


@router.delete("/{upload_id}", status_code=204, responses=ERRORS | problem_responses(Conflict))
def abort_upload(upload_id: UploadId, *, subject: Writer, store: BlobStoreDep, database: DatabaseDep) -> None:
    """Remove what has arrived. Harmless when called again."""
    with database.write() as session:
        parted = service.abort(session, subject, upload_id).parted
    store.discard_parts(parted)


def _open_part(database: Database, tenant_id: str, upload_id: str, number: int) -> PartedUpload:
    with database.read() as session:
        upload = service.get_open(session, tenant_id, upload_id)
        service.part_size(upload, number)
        return upload.parted


def _show(upload: LargeUpload) -> UploadOut:
    return UploadOut.model_validate(
        {name: getattr(upload, name, None) for name in UploadOut.model_fields} | {"num_parts": upload.parted.num_parts}
    )


def _progress(upload: LargeUpload, parts: dict[int, int]) -> UploadProgress:
    listed = [PartOut(number=number, size=size) for number, size in sorted(parts.items())]
    return UploadProgress(**_show(upload).model_dump(), parts=listed)
