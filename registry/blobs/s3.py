"""S3BlobStore: blobs in any S3-compatible store. What its parts do is in `s3_bucket`, `s3_upload`, `s3_read`, `s3_parts`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from registry.blobs.s3_bucket import KeyMissing, S3Bucket
from registry.blobs.s3_parts import S3Parts
from registry.blobs.s3_read import open_range_file, stream_range
from registry.blobs.s3_upload import S3Upload, size_of
from registry.blobs.store import STALE_UPLOAD_S, BlobMissing, StoredBlob
from registry.config import S3Settings

PROBE = ".probe"


class S3BlobStore(S3Parts):
    """Safe for any number of threads and processes over one bucket. Raises ValueError for a URL that names no bucket."""

    def __init__(self, url: str, options: S3Settings) -> None:
        bucket = S3Bucket(url, options)
        executor = ThreadPoolExecutor(max(4, options.max_connections // 2), thread_name_prefix="s3-parts")
        super().__init__(bucket, executor=executor, direct=options.direct_uploads)
        self._bucket = bucket
        self._executor = executor

    def begin(self, tenant_id: str, sha256: str, *, max_bytes: int) -> S3Upload:
        key = self._bucket.blob_key(tenant_id, sha256)
        return S3Upload(self._bucket, key, sha256=sha256, max_bytes=max_bytes, executor=self._executor)

    def size(self, tenant_id: str, sha256: str) -> int | None:
        return size_of(self._bucket, self._bucket.blob_key(tenant_id, sha256))

    def open(self, tenant_id: str, sha256: str) -> BinaryIO:
        return open_range_file(self._bucket, self._bucket.blob_key(tenant_id, sha256), size=self._size(tenant_id, sha256))

    def stream(self, tenant_id: str, sha256: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        size = self._size(tenant_id, sha256)
        length = max(0, size - start) if length is None else min(length, size - start)
        if length <= 0:
            return iter(())
        try:
            return stream_range(self._bucket, self._bucket.blob_key(tenant_id, sha256), start=start, length=length)
        except KeyMissing as error:
            raise BlobMissing(sha256) from error

    def list(self, tenant_id: str | None = None, *, after: tuple[str, str] | None = None) -> Iterator[StoredBlob]:
        beyond = {} if after is None else {"StartAfter": self._bucket.blob_key(*after)}
        for page in self._bucket.pages("list_objects_v2", Prefix=self._bucket.tenant_prefix(tenant_id), **beyond):
            for item in page.get("Contents", ()):
                found = self._bucket.parse_key(item["Key"])
                if found is not None:
                    yield StoredBlob(*found, item["Size"], item["LastModified"].astimezone(dt.UTC))

    def delete(self, tenant_id: str, sha256: str) -> bool:
        key = self._bucket.blob_key(tenant_id, sha256)
        if size_of(self._bucket, key) is None:
            return False
        self._bucket.call("delete_object", key)
        return True

    def download_url(self, tenant_id: str, sha256: str, *, ttl_s: int) -> str | None:
        key = self._bucket.blob_key(tenant_id, sha256)
        return self._bucket.presign("get_object", key, ttl_s=ttl_s, ResponseContentType="application/octet-stream")

    def check_writable(self) -> None:
        self._bucket.call("put_object", self._bucket.prefix + PROBE, Body=b"probe", **self._bucket.encryption)

    def remove_stale_uploads(self, *, older_than_s: float = STALE_UPLOAD_S) -> int:
        return self.remove_stale(older_than=dt.datetime.now(dt.UTC) - dt.timedelta(seconds=older_than_s))

    def _size(self, tenant_id: str, sha256: str) -> int:
        size = self.size(tenant_id, sha256)
        if size is None:
            raise BlobMissing(sha256)
        return size
