"""`/blobs`: bytes in and out by their sha256. No session is open while bytes move."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from registry import metrics
from registry.blobs import repository, service
from registry.blobs.models import Blob
from registry.blobs.schemas import BlobOut, Sha256Path
from registry.blobs.store import CHUNK_BYTES, BlobMissing, BlobStore, Upload
from registry.config import Settings
from registry.db import Database, DatabaseDep
from registry.errors import (
    BadRequest,
    Forbidden,
    Invalid,
    NotFound,
    QuotaExceeded,
    RangeNotSatisfiable,
    StorageFull,
    TooLarge,
    problem_responses,
)
from registry.quotas import service as quotas
from registry.quotas.endpoints import DefaultsDep
from registry.quotas.schemas import Measure
from registry.quotas.service import Limits
from registry.routing import Route
from registry.tenants.auth import TenantSubject, require

router = APIRouter(prefix="/blobs", tags=["blobs"], route_class=Route)

Reader = Annotated[TenantSubject, Depends(require("adapters:read"))]
Writer = Annotated[TenantSubject, Depends(require("adapters:write"))]
RangeHeader = Annotated[str | None, Header(alias="Range", max_length=64)]


REDIRECTS: dict[int | str, dict[str, object]] = {
    307: {"description": "The bytes lie at `Location` for a while; `Range` goes there as well."}
}


def _blob_store(request: Request) -> BlobStore:
    store: BlobStore = request.app.state.blob_store
    return store


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


BlobStoreDep = Annotated[BlobStore, Depends(_blob_store)]
SettingsDep = Annotated[Settings, Depends(_settings)]


@router.put(
    "/{sha256}",
    status_code=201,
    responses=problem_responses(BadRequest, Forbidden, QuotaExceeded, Invalid, TooLarge, StorageFull)
    | {200: {"description": "The tenant had these bytes.", "model": BlobOut}},
)
async def put_blob(
    sha256: Sha256Path,
    *,
    request: Request,
    response: Response,
    subject: Writer,
    store: BlobStoreDep,
    database: DatabaseDep,
    settings: SettingsDep,
    defaults: DefaultsDep,
) -> BlobOut:
    """Upload bytes under their sha256. They are hashed on the way in; a wrong digest keeps nothing."""
    max_bytes = settings.max_inline_blob_bytes
    _refuse_announced_excess(request, max_bytes=max_bytes)
    announced = _announced(request)
    room = await run_in_threadpool(_room, database, subject, sha256, announced=announced, defaults=defaults)
    if room is not None and not announced:
        max_bytes = min(max_bytes, room)
    upload = await run_in_threadpool(store.begin, subject.tenant_id, sha256, max_bytes=max_bytes)
    try:
        await receive(request, upload)
        size = await run_in_threadpool(upload.commit)
    finally:
        upload.abort()  # not in the thread pool: a cancelled request may await nothing more
    metrics.blob_bytes.labels("in").inc(size)
    blob, added = await run_in_threadpool(service.keep_upload, database, store, subject, sha256, size=size, defaults=defaults)
    response.status_code = 201 if added else 200
    return BlobOut(sha256=blob.sha256, size=blob.size, created_at=blob.created_at)


@router.head("/{sha256}", response_class=Response, responses=problem_responses(Forbidden, NotFound))
def head_blob(sha256: Sha256Path, *, subject: Reader, database: DatabaseDep, store: BlobStoreDep) -> Response:
    """Whether the tenant has these bytes, so that a client need not send them again. Bytes that a disk lost are absent."""
    with database.read() as session:
        blob = service.get(session, subject.tenant_id, sha256)
    if store.size(subject.tenant_id, sha256) != blob.size:
        raise BlobMissing(sha256)
    return Response(headers=_blob_headers(blob) | {"Content-Length": str(blob.size)})


@router.get(
    "/{sha256}", response_class=StreamingResponse, responses=problem_responses(Forbidden, NotFound, RangeNotSatisfiable) | REDIRECTS
)
def get_blob(
    sha256: Sha256Path,
    *,
    subject: Reader,
    database: DatabaseDep,
    store: BlobStoreDep,
    settings: SettingsDep,
    byte_range: RangeHeader = None,
) -> Response:
    """The bytes; one `Range: bytes=first-last` is understood. 307 to the store itself where the installation is set so."""
    with database.read() as session:
        blob = service.get(session, subject.tenant_id, sha256)
    return blob_or_redirect(store, blob, byte_range=byte_range, settings=settings)


def blob_or_redirect(store: BlobStore, blob: Blob, *, byte_range: str | None, settings: Settings) -> Response:
    """Like `blob_response`, or 307 to a URL of the store that is good for this blob alone, and not for long."""
    url = store.download_url(blob.tenant_id, blob.sha256, ttl_s=settings.presigned_ttl_s) if settings.blob_redirect else None
    if url is None:
        return blob_response(store, blob, byte_range=byte_range)
    return RedirectResponse(url, status_code=307, headers={"Cache-Control": "no-store"})


def blob_response(store: BlobStore, blob: Blob, *, byte_range: str | None) -> Response:
    """Stream a blob, or the part of it that a Range header asks for. Raises RangeNotSatisfiable for one beyond its end."""
    headers = _blob_headers(blob)
    start, length, status = 0, blob.size, 200
    part = None if byte_range is None else parse_range(byte_range, size=blob.size)
    if part is not None:
        start, length = part
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{blob.size}"
        status = 206
    chunks = store.stream(blob.tenant_id, blob.sha256, start=start, length=length)
    headers["Content-Length"] = str(length)
    return StreamingResponse(_counted(chunks), status_code=status, media_type="application/octet-stream", headers=headers)


def _counted(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        metrics.blob_bytes.labels("out").inc(len(chunk))
        yield chunk


def parse_range(header: str, *, size: int) -> tuple[int, int] | None:
    """(start, length) of `bytes=first-last`, `bytes=first-` or `bytes=-suffix`.

    None for what RFC 9110 lets a server ignore: other units, several ranges, what cannot be read.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if first and last and int(first) > int(last):
        return None
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise RangeNotSatisfiable(header, size=size)
    return start, stop - start


def _blob_headers(blob: Blob) -> dict[str, str]:
    return {
        "ETag": f'"{blob.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, immutable",
        "X-Content-Type-Options": "nosniff",
    }


def _refuse_announced_excess(request: Request, *, max_bytes: int) -> None:
    announced = _announced(request)
    if announced > max_bytes:
        raise TooLarge(
            f"Content-Length {announced} is over the {max_bytes} bytes a blob may have here; use POST /api/v1/uploads",
            field="Content-Length",
            value=announced,
            remedy=f"stay within {max_bytes} bytes",
        )


def _announced(request: Request) -> int:
    """Content-Length; 0 where the client does not know it yet."""
    announced = request.headers.get("content-length", "")
    return int(announced) if announced.isdigit() else 0


def _room(database: Database, subject: TenantSubject, sha256: str, *, announced: int, defaults: Limits) -> int | None:
    """How much the tenant may still store; None for no limit, or for what it has already. Raises QuotaExceeded.

    Before bytes move, so that what cannot be kept is not stored first. The binding look is taken when they are recorded.
    """
    with database.read() as session:
        if repository.sizes(session, subject.tenant_id, [sha256]):
            return None
        return quotas.require_room(session, subject.tenant_id, Measure.BYTES, max(1, announced), defaults=defaults)


async def receive(request: Request, upload: Upload) -> None:
    """Hand the body on in chunks of about CHUNK_BYTES: one thread hop each."""
    held = bytearray()
    try:
        async for chunk in request.stream():
            held += chunk
            if len(held) >= CHUNK_BYTES:
                await run_in_threadpool(upload.write, bytes(held))
                held.clear()
    except ClientDisconnect as error:
        raise BadRequest("the connection closed before the body ended; upload again", field="body") from error
    await run_in_threadpool(upload.write, bytes(held))
