"""Blobs as files under one directory: `<root>/<tenant_id>/<sha256>`, written beside as `<root>/.uploads/<random>`.

A blob appears by one rename after its bytes are hashed and on disk, so a crash leaves either nothing or a file in
`.uploads`, which `remove_stale_uploads` takes away.
"""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from registry.blobs.store import CHUNK_BYTES, STALE_UPLOAD_S, BlobMissing, StoredBlob
from registry.errors import Invalid, StorageFull, TooLarge, Unavailable

# EFBIG is what a file-size limit of the operating system answers; for the caller it is the same thing.
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UPLOADS = ".uploads"

_TENANT_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class LocalUpload:
    """Hashes in flight, into a file that nobody else knows; `commit` renames it to its address."""

    def __init__(self, temporary: Path, address: Path, *, sha256: str, max_bytes: int) -> None:
        self._temporary = temporary
        self._address = address
        self._sha256 = sha256
        self._max_bytes = max_bytes
        self._size = 0
        self._hash = hashlib.sha256()
        with _full_disk_is_an_error():
            self._file = open(temporary, "xb", buffering=0)  # noqa: PTH123, SIM115 - unbuffered: a full disk shows in write, not in close

    def write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > self._max_bytes:
            raise TooLarge(
                f"the blob is larger than the {self._max_bytes} bytes allowed here; upload a smaller file",
                field="body",
                value=f"more than {self._max_bytes} bytes",
                remedy=f"stay within {self._max_bytes} bytes",
            )
        self._hash.update(chunk)
        rest = memoryview(chunk)
        with _full_disk_is_an_error():
            while rest:
                rest = rest[self._file.write(rest) :]

    def commit(self) -> int:
        found = self._hash.hexdigest()
        if found != self._sha256:
            raise Invalid(
                f"the bytes hash to {found}, not to {self._sha256}; upload the bytes that the address names",
                field="sha256",
                value=self._sha256,
                remedy=f"PUT them to /api/v1/blobs/{found}",
                code="digest_mismatch",
            )
        with _full_disk_is_an_error():
            os.fsync(self._file.fileno())
            self._file.close()
            _make_directory(self._address.parent)
            self._temporary.replace(self._address)
            _sync_directory(self._address.parent)
        return self._size

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class LocalBlobStore:
    """Safe for any number of threads and processes over one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._uploads = root / UPLOADS
        self._uploads.mkdir(parents=True, exist_ok=True)

    def begin(self, tenant_id: str, sha256: str, *, max_bytes: int) -> LocalUpload:
        address = self._address(tenant_id, sha256)
        return LocalUpload(self._uploads / uuid4().hex, address, sha256=sha256, max_bytes=max_bytes)

    def size(self, tenant_id: str, sha256: str) -> int | None:
        status = _stat(self._address(tenant_id, sha256))
        return None if status is None else status.st_size

    def open(self, tenant_id: str, sha256: str) -> BinaryIO:
        try:
            return self._address(tenant_id, sha256).open("rb")
        except FileNotFoundError as error:
            raise BlobMissing(sha256) from error

    def stream(self, tenant_id: str, sha256: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        file = self.open(tenant_id, sha256)
        if start:
            file.seek(start)
        return _read_chunks(file, length=length)

    def list(self, tenant_id: str | None = None) -> Iterator[StoredBlob]:
        pattern = "*/*" if tenant_id is None else f"{tenant_id}/*"
        for path in self._root.glob(pattern):
            status = _stat(path)
            if status is not None and path.parent.name != UPLOADS and _SHA256.fullmatch(path.name):
                stored_at = dt.datetime.fromtimestamp(status.st_mtime, tz=dt.UTC)
                yield StoredBlob(path.parent.name, path.name, status.st_size, stored_at)

    def delete(self, tenant_id: str, sha256: str) -> bool:
        try:
            self._address(tenant_id, sha256).unlink()
        except FileNotFoundError:
            return False
        return True

    def check_writable(self) -> None:
        probe = self._uploads / uuid4().hex
        try:
            with _full_disk_is_an_error():
                probe.write_bytes(b"probe")
        except OSError as error:
            raise Unavailable(f"the blob directory {self._root} cannot be written: {error.strerror}", retry_after_s=5) from error
        finally:
            probe.unlink(missing_ok=True)

    def remove_stale_uploads(self, *, older_than_s: float = STALE_UPLOAD_S) -> int:
        # a running upload touches its file, so age is safe to go by
        oldest = time.time() - older_than_s
        removed = 0
        for path in self._uploads.iterdir():
            status = _stat(path)
            if status is not None and status.st_mtime < oldest:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _address(self, tenant_id: str, sha256: str) -> Path:
        assert _TENANT_ID.fullmatch(tenant_id), f"{tenant_id!r} is no tenant id: callers pass ids, never user input"
        assert _SHA256.fullmatch(sha256), f"{sha256!r} is no sha256: endpoints check it by pattern"
        return self._root / tenant_id / sha256


@contextmanager
def _full_disk_is_an_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise StorageFull(
            "the disk below the blobs is full and nothing of this upload was kept; free space or ask the operator, then upload again",
            remedy="free space, then upload again",
        ) from error


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that another process took away a moment ago."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _read_chunks(file: BinaryIO, *, length: int | None) -> Iterator[bytes]:
    with file:
        while length is None or length > 0:
            chunk = file.read(CHUNK_BYTES if length is None else min(CHUNK_BYTES, length))
            if not chunk:
                return
            length = None if length is None else length - len(chunk)
            yield chunk


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """A rename is durable only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
