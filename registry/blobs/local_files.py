"""Files that appear whole or not at all: written beside, made durable, renamed. A full disk is StorageFull."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.blobs.store import digest_mismatch, refuse_excess
from registry.errors import StorageFull

# EFBIG is what a file-size limit of the operating system answers; for the caller it is the same thing.
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class NewFile:
    """A file that nobody else knows until `publish` renames it. `what` the bytes are is between subclasses and callers."""

    def __init__(self, temporary: Path, *, max_bytes: int) -> None:
        self._temporary = temporary
        self._max_bytes = max_bytes
        self._size = 0
        with full_disk_is_an_error():
            self._file = open(temporary, "xb", buffering=0)  # noqa: PTH123, SIM115 - unbuffered: a full disk shows in write, not in close

    def write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        refuse_excess(self._size, max_bytes=self._max_bytes)
        rest = memoryview(chunk)
        with full_disk_is_an_error():
            while rest:
                rest = rest[self._file.write(rest) :]

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def publish(self, address: Path) -> int:
        with full_disk_is_an_error():
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(address)
            sync_directory(address.parent)
        return self._size


class LocalUpload(NewFile):
    """Hashes in flight; `commit` renames to the address that the hash proves."""

    def __init__(self, temporary: Path, address: Path, *, sha256: str, max_bytes: int) -> None:
        super().__init__(temporary, max_bytes=max_bytes)
        self._address = address
        self._sha256 = sha256
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        super().write(chunk)
        self._hash.update(chunk)

    def commit(self) -> int:
        found = self._hash.hexdigest()
        if found != self._sha256:
            raise digest_mismatch(found, named=self._sha256)
        with full_disk_is_an_error():
            make_directory(self._address.parent)
        return self.publish(self._address)


@contextmanager
def full_disk_is_an_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise StorageFull(
            "the disk below the blobs is full and nothing of these bytes was kept; free space or ask the operator, then send them again",
            remedy="free space, then send them again",
        ) from error


def stat_of(path: Path) -> os.stat_result | None:
    """None for a file that another process took away a moment ago."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """A rename is durable only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
