"""Large uploads into S3: a multipart upload at `<tenant_id>/uploads/<id>`, then hashed and copied to its address.

Clients may hold presigned URLs for parts, never for an address. Once the parts are joined those URLs name nothing, so
what is hashed is what is copied.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import structlog

from registry.blobs.s3_bucket import KeyMissing, KeyTaken, S3Bucket
from registry.blobs.s3_read import stream_range
from registry.blobs.s3_upload import S3Upload, is_whole, size_of
from registry.blobs.store import PartedUpload, UploadLost, digest_mismatch, refuse_excess, refuse_part_size, upload_lost
from registry.errors import Unavailable

log = structlog.get_logger(__name__)

# one CopyObject takes up to 5 GiB, but answers late; pieces answer within any time-out
COPY_BYTES = 256 << 20


class S3Part:
    """One part through the API, in memory until it is whole."""

    def __init__(self, bucket: S3Bucket, upload: PartedUpload, number: int) -> None:
        self._bucket, self._upload, self._number = bucket, upload, number
        self._held = bytearray()

    def write(self, chunk: bytes) -> None:
        self._held += chunk
        refuse_excess(len(self._held), max_bytes=self._upload.size_of(self._number))

    def commit(self) -> int:
        refuse_part_size(self._upload, self._number, found=len(self._held))
        key = self._bucket.upload_key(self._upload.tenant_id, self._upload.upload_id)
        try:
            self._bucket.call("upload_part", key, UploadId=self._upload.handle, PartNumber=self._number, Body=bytes(self._held))
        except KeyMissing as error:
            raise upload_lost(self._upload) from error
        return len(self._held)

    def abort(self) -> None:
        self._held.clear()


class S3Parts:
    """The PartStore half of S3BlobStore."""

    def __init__(self, bucket: S3Bucket, *, executor: Executor, direct: bool) -> None:
        self._bucket = bucket
        self._executor = executor
        self._direct = direct

    def begin_parts(self, tenant_id: str, upload_id: str) -> str:
        key = self._bucket.upload_key(tenant_id, upload_id)
        handle: str = self._bucket.call("create_multipart_upload", key, **self._bucket.encryption)["UploadId"]
        return handle

    def part_url(self, upload: PartedUpload, number: int, *, ttl_s: int) -> str | None:
        if not self._direct:
            return None
        arguments = {"UploadId": upload.handle, "PartNumber": number, "ContentLength": upload.size_of(number)}
        return self._bucket.presign("upload_part", self._key(upload), ttl_s=ttl_s, **arguments)

    def begin_part(self, upload: PartedUpload, number: int) -> S3Part:
        return S3Part(self._bucket, upload, number)

    def parts(self, upload: PartedUpload) -> dict[int, int]:
        return {part["PartNumber"]: part["Size"] for part in self._list_parts(upload)}

    def finalise(self, upload: PartedUpload, *, sha256: str, check: Callable[[], None]) -> None:
        address = self._bucket.blob_key(upload.tenant_id, sha256)
        self._join(upload)
        if size_of(self._bucket, self._key(upload)) is None:
            # an earlier attempt got this far and died: either its copy is there, or there is nothing
            if not is_whole(self._bucket, address, sha256=sha256, size=upload.size):
                raise upload_lost(upload)
            return
        found = self._hash(upload, check)
        if found != sha256:
            self.discard_parts(upload)
            raise digest_mismatch(found, named=sha256)
        self._place(upload, address, sha256=sha256, check=check)
        self._bucket.call("delete_object", self._key(upload))

    def _place(self, upload: PartedUpload, address: str, *, sha256: str, check: Callable[[], None]) -> None:
        try:
            self._copy(upload, address, check=check, IfNoneMatch="*")
        except KeyTaken:
            if not is_whole(self._bucket, address, sha256=sha256, size=upload.size):
                self._copy(upload, address, check=check)
        except Unavailable:  # some stores fail at copying alone, again and again: what can be read and written can be carried
            log.warning("blob_store.copy_failed", key=address)
            self._carry(upload, address, sha256=sha256, check=check)

    def _carry(self, upload: PartedUpload, address: str, *, sha256: str, check: Callable[[], None]) -> None:
        """The copy through this process. Raises Unavailable where the store is away as a whole."""
        carried = S3Upload(self._bucket, address, sha256=sha256, max_bytes=upload.size, executor=self._executor)
        try:
            for chunk in stream_range(self._bucket, self._key(upload), start=0, length=upload.size):
                carried.write(chunk)
                check()
            carried.commit()
        finally:
            carried.abort()

    def discard_parts(self, upload: PartedUpload) -> None:
        self._abort(self._key(upload), upload.handle)
        self._bucket.call("delete_object", self._key(upload))

    def remove_stale(self, *, older_than: dt.datetime) -> int:
        """Abort the multipart uploads that began before, and delete joined ones that nobody finalised."""
        removed = 0
        for page in self._bucket.pages("list_multipart_uploads", Prefix=self._bucket.prefix):
            for item in page.get("Uploads", ()):
                if item["Initiated"] < older_than and self._abort(item["Key"], item["UploadId"]):
                    removed += 1
        for page in self._bucket.pages("list_objects_v2", Prefix=self._bucket.prefix):
            for item in page.get("Contents", ()):
                if self._bucket.is_upload_key(item["Key"]) and item["LastModified"] < older_than:
                    self._bucket.call("delete_object", item["Key"])
                    removed += 1
        return removed

    def _abort(self, key: str, handle: str) -> bool:
        try:
            self._bucket.call("abort_multipart_upload", key, UploadId=handle)
        except KeyMissing:
            return False
        return True

    def _key(self, upload: PartedUpload) -> str:
        return self._bucket.upload_key(upload.tenant_id, upload.upload_id)

    def _list_parts(self, upload: PartedUpload) -> list[dict[str, Any]]:
        try:
            pages = self._bucket.pages("list_parts", Key=self._key(upload), UploadId=upload.handle)
            return [part for page in pages for part in page.get("Parts", ())]
        except KeyMissing as error:
            raise upload_lost(upload) from error

    def _join(self, upload: PartedUpload) -> None:
        """Complete the multipart upload, unless an earlier attempt did. From here on no part URL works."""
        try:
            parts = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in self._list_parts(upload)]
            if parts:
                self._bucket.call("complete_multipart_upload", self._key(upload), UploadId=upload.handle, MultipartUpload={"Parts": parts})
        except (KeyMissing, UploadLost):
            return

    def _hash(self, upload: PartedUpload, check: Callable[[], None]) -> str:
        digest = hashlib.sha256()
        for chunk in stream_range(self._bucket, self._key(upload), start=0, length=upload.size):
            digest.update(chunk)
            check()
        return digest.hexdigest()

    def _copy(self, upload: PartedUpload, address: str, *, check: Callable[[], None], **condition: str) -> None:
        source = {"Bucket": self._bucket.name, "Key": self._key(upload)}
        if upload.size <= COPY_BYTES:
            self._bucket.call("copy_object", address, CopySource=source, **condition, **self._bucket.encryption)
            return
        handle = self._bucket.call("create_multipart_upload", address, **self._bucket.encryption)["UploadId"]
        done = False
        try:
            parts = []
            for number, start in enumerate(range(0, upload.size, COPY_BYTES), start=1):
                check()
                piece = f"bytes={start}-{min(start + COPY_BYTES, upload.size) - 1}"
                arguments = {"UploadId": handle, "PartNumber": number, "CopySource": source, "CopySourceRange": piece}
                answer = self._bucket.call("upload_part_copy", address, **arguments)
                parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
            self._bucket.call("complete_multipart_upload", address, UploadId=handle, MultipartUpload={"Parts": parts}, **condition)
            done = True
        finally:
            if not done:
                self._abort(address, handle)
