"""One blob on its way into S3: hashed in flight, invisible until its address is proven.

Up to PART_BYTES it is one conditional PUT. Above, a multipart upload runs while bytes arrive, which needs no disk and
little memory, and one conditional call makes it visible.
"""

from __future__ import annotations

import base64
import hashlib
from concurrent.futures import Executor, Future
from typing import Any

import structlog

from registry.blobs.s3_bucket import KeyMissing, KeyTaken, S3Bucket
from registry.blobs.s3_read import stream_range
from registry.blobs.store import digest_mismatch, refuse_excess
from registry.errors import RegistryError

log = structlog.get_logger(__name__)

PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 4


class S3Upload:
    """`executor` sends parts while the next one arrives; at most PARTS_IN_FLIGHT + 1 of them are in memory."""

    def __init__(self, bucket: S3Bucket, key: str, *, sha256: str, max_bytes: int, executor: Executor) -> None:
        self._bucket, self._key, self._sha256, self._max_bytes, self._executor = bucket, key, sha256, max_bytes, executor
        self._held = bytearray()
        self._size = 0
        self._hash = hashlib.sha256()
        self._upload_id: str | None = None
        self._parts: list[Future[dict[str, Any]]] = []

    def write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        refuse_excess(self._size, max_bytes=self._max_bytes)
        self._hash.update(chunk)
        self._held += chunk
        while len(self._held) > PART_BYTES:
            self._send_part(bytes(self._held[:PART_BYTES]))
            del self._held[:PART_BYTES]

    def commit(self) -> int:
        found = self._hash.hexdigest()
        if found != self._sha256:
            raise digest_mismatch(found, named=self._sha256)
        try:
            self._publish(IfNoneMatch="*")
        except KeyTaken:
            if is_whole(self._bucket, self._key, sha256=self._sha256, size=self._size):
                return self._size  # `abort` takes the parts away
            log.warning("blob_store.healed", key=self._key)
            self._publish()
        self._upload_id = None
        return self._size

    def abort(self) -> None:
        """Returns at once: it is called where nothing may be awaited. What a lost connection leaves, the stale clean-up takes."""
        upload_id, self._upload_id = self._upload_id, None
        if upload_id is not None:
            self._executor.submit(self._abort, upload_id)

    def _publish(self, **condition: str) -> None:
        if self._upload_id is None:
            checksum = base64.b64encode(self._hash.digest()).decode()
            arguments = {"ContentLength": self._size, "ChecksumSHA256": checksum, **condition, **self._bucket.encryption}
            self._bucket.call("put_object", self._key, Body=bytes(self._held), **arguments)
            return
        if self._held:
            self._send_part(bytes(self._held))
            self._held.clear()
        parts = [part.result() for part in self._parts]
        self._bucket.call("complete_multipart_upload", self._key, UploadId=self._upload_id, MultipartUpload={"Parts": parts}, **condition)

    def _send_part(self, data: bytes) -> None:
        if self._upload_id is None:
            self._upload_id = self._bucket.call("create_multipart_upload", self._key, **self._bucket.encryption)["UploadId"]
        if len(self._parts) >= PARTS_IN_FLIGHT:
            self._parts[-PARTS_IN_FLIGHT].result()  # also says here that the store refuses
        self._parts.append(self._executor.submit(self._put_part, self._upload_id, len(self._parts) + 1, data))

    def _put_part(self, upload_id: str | None, number: int, data: bytes) -> dict[str, Any]:
        answer = self._bucket.call("upload_part", self._key, UploadId=upload_id, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _abort(self, upload_id: str) -> None:
        for part in self._parts:
            part.cancel()
        for part in self._parts:  # queued before this call, so it waits for nobody behind it
            if not part.cancelled():
                part.exception()
        try:
            self._bucket.call("abort_multipart_upload", self._key, UploadId=upload_id)
        except KeyMissing:
            pass
        except RegistryError as error:
            log.warning("blob_store.abort_failed", key=self._key, error=error.detail)


def size_of(bucket: S3Bucket, key: str) -> int | None:
    try:
        return int(bucket.call("head_object", key)["ContentLength"])
    except KeyMissing:
        return None


def is_whole(bucket: S3Bucket, key: str, *, sha256: str, size: int) -> bool:
    """Whether the bytes that lie there are the ones that the address names: read and hashed, for disks rot."""
    if size_of(bucket, key) != size:
        return False
    digest = hashlib.sha256()
    try:
        for chunk in stream_range(bucket, key, start=0, length=size) if size else ():
            digest.update(chunk)
    except KeyMissing:
        return False
    return digest.hexdigest() == sha256
