"""Reading from S3: a seekable file over ranges, and a stream that survives broken connections."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import structlog
from botocore.exceptions import BotoCoreError

from registry.blobs.s3_bucket import OUTAGE_RETRY_AFTER_S, S3Bucket
from registry.blobs.store import CHUNK_BYTES
from registry.errors import Unavailable

log = structlog.get_logger(__name__)

MAX_REOPENS = 3


def open_range_file(bucket: S3Bucket, key: str, *, size: int) -> BinaryIO:
    """A file that fetches what is read, CHUNK_BYTES at a time: a header costs one request, wherever the weights end."""
    return cast(BinaryIO, io.BufferedReader(_RangeFile(bucket, key, size=size), buffer_size=CHUNK_BYTES))


class _RangeFile(io.RawIOBase):
    def __init__(self, bucket: S3Bucket, key: str, *, size: int) -> None:
        self._bucket, self._key, self._size, self._position = bucket, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}: a position is not negative")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._size - self._position)
        if length <= 0:
            return 0
        filled = 0
        for chunk in stream_range(self._bucket, self._key, start=self._position, length=length):
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        self._position += filled
        return filled


def stream_range(bucket: S3Bucket, key: str, *, start: int, length: int) -> Iterator[bytes]:
    """`length` > 0 bytes from `start`, in chunks. The first request is made at the call. Raises KeyMissing, Unavailable."""
    body = _get(bucket, key, start=start, stop=start + length)
    return _chunks(bucket, key, body, start=start, stop=start + length)


def _get(bucket: S3Bucket, key: str, *, start: int, stop: int) -> Any:
    return bucket.call("get_object", key, Range=f"bytes={start}-{stop - 1}")["Body"]


def _chunks(bucket: S3Bucket, key: str, body: Any, *, start: int, stop: int) -> Iterator[bytes]:
    """A connection that breaks is opened again where it broke: the address names the bytes, so they are the same ones."""
    reopened = 0
    try:
        while start < stop:
            chunk = _read(body, min(CHUNK_BYTES, stop - start), last_try=reopened == MAX_REOPENS)
            if not chunk:
                reopened += 1
                log.warning("blob_store.read_broken", key=key, at=start, reopened=reopened)
                body.close()
                body = _get(bucket, key, start=start, stop=stop)
                continue
            start += len(chunk)
            yield chunk
    finally:
        body.close()


def _read(body: Any, length: int, *, last_try: bool) -> bytes:
    """Nothing where the connection broke and may be opened again. Raises Unavailable."""
    try:
        chunk: bytes = body.read(length)
    except BotoCoreError:
        chunk = b""
    if not chunk and last_try:
        raise Unavailable("the blob store breaks off in the middle of a blob", retry_after_s=OUTAGE_RETRY_AFTER_S, remedy="try again soon")
    return chunk
