"""Blobs as files under one directory: `<root>/<tenant_id>/<sha256>`, written beside as `<root>/.uploads/<random>`.

A blob appears by one rename after its bytes are hashed and on disk, so a crash leaves either nothing or a file in
`.uploads`, which `remove_stale_uploads` takes away.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import BinaryIO
from uuid import uuid4

from registry.artifact.digest import is_digest
from registry.blobs.local_files import LocalUpload, full_disk_is_an_error, stat_of
from registry.blobs.local_parts import UPLOADS, LocalParts
from registry.blobs.store import CHUNK_BYTES, BlobMissing, StoredBlob
from registry.errors import Unavailable


class LocalBlobStore(LocalParts):
    """Safe for any number of threads and processes over one directory."""

    def begin(self, tenant_id: str, sha256: str, *, max_bytes: int) -> LocalUpload:
        address = self._address(tenant_id, sha256)
        return LocalUpload(self._uploads / uuid4().hex, address, sha256=sha256, max_bytes=max_bytes)

    def size(self, tenant_id: str, sha256: str) -> int | None:
        status = stat_of(self._address(tenant_id, sha256))
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
        chunks = _read_chunks(file, length=length)
        next(chunks)  # from here on its end closes the file, also where nobody takes a byte: a client that left at once
        return chunks

    def list(self, tenant_id: str | None = None, *, after: tuple[str, str] | None = None) -> Iterator[StoredBlob]:
        """One tenant's names are in memory at a time, to be in order."""
        for tenant in self._tenants() if tenant_id is None else (tenant_id,):
            if after is None or tenant >= after[0]:
                yield from self._list_one(tenant, beyond=after[1] if after is not None and tenant == after[0] else "")

    def _tenants(self) -> Sequence[str]:
        return sorted(path.name for path in self._root.iterdir() if path.name != UPLOADS and path.is_dir())

    def _list_one(self, tenant_id: str, *, beyond: str) -> Iterator[StoredBlob]:
        folder = self._root / tenant_id
        names = sorted(path.name for path in folder.glob("*") if is_digest(path.name) and path.name > beyond)
        for name in names:
            status = stat_of(folder / name)
            if status is not None:
                stored_at = dt.datetime.fromtimestamp(status.st_mtime, tz=dt.UTC)
                yield StoredBlob(tenant_id, name, status.st_size, stored_at)

    def delete(self, tenant_id: str, sha256: str) -> bool:
        try:
            self._address(tenant_id, sha256).unlink()
        except FileNotFoundError:
            return False
        return True

    def download_url(self, _tenant_id: str, _sha256: str, *, ttl_s: int) -> str | None:  # noqa: ARG002 - files have no URL
        return None

    def check_writable(self) -> None:
        probe = self._uploads / uuid4().hex
        try:
            with full_disk_is_an_error():
                probe.write_bytes(b"probe")
        except OSError as error:
            raise Unavailable(f"the blob directory {self._root} cannot be written: {error.strerror}", retry_after_s=5) from error
        finally:
            probe.unlink(missing_ok=True)


def _read_chunks(file: BinaryIO, *, length: int | None) -> Iterator[bytes]:
    with file:
        yield b""
        while length is None or length > 0:
            chunk = file.read(CHUNK_BYTES if length is None else min(CHUNK_BYTES, length))
            if not chunk:
                return
            length = None if length is None else length - len(chunk)
            yield chunk
