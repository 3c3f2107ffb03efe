"""The seam between content addresses and where bytes lie. A store knows nothing of the database.

Keys are `tenant_id/sha256`: tenants share nothing, so that nobody can learn from a store what another tenant has.
Every store passes `tests/registry/blobs/conformance.py`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from registry.errors import NotFound

CHUNK_BYTES = 1 << 20
STALE_UPLOAD_S = 24 * 3600.0


class BlobMissing(NotFound):
    """Absent, or another tenant's: both read the same."""

    code = "blob_missing"

    def __init__(self, sha256: str) -> None:
        super().__init__(
            f"there is no blob {sha256}; upload its bytes first", field="sha256", value=sha256, remedy=f"PUT /api/v1/blobs/{sha256}"
        )


@dataclass(frozen=True)
class StoredBlob:
    """What lies in a store, for the sweep that compares it with the rows."""

    tenant_id: str
    sha256: str
    size: int
    stored_at: dt.datetime


class Upload(Protocol):
    """One blob on its way in. Nothing is visible before `commit`; nothing stays behind after `abort`."""

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge over the bound given to `begin`, StorageFull when the disk is."""

    def commit(self) -> int:
        """Make the bytes durable and visible at once, and return their number. Raises Invalid on a wrong digest."""

    def abort(self) -> None:
        """Leave nothing behind. Harmless after `commit` and when called again."""


class BlobStore(Protocol):
    def begin(self, tenant_id: str, sha256: str, *, max_bytes: int) -> Upload:
        """Start an upload. Bytes that are already there are replaced by equal ones, which heals a damaged disk."""

    def size(self, tenant_id: str, sha256: str) -> int | None:
        """Bytes of a blob, or None where there is none."""

    def open(self, tenant_id: str, sha256: str) -> BinaryIO:
        """A seekable file. Raises BlobMissing."""

    def stream(self, tenant_id: str, sha256: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes [start, start + length) in bounded chunks. Raises BlobMissing at the call, not at the first chunk."""

    def list(self, tenant_id: str | None = None) -> Iterator[StoredBlob]:
        """Every blob of one tenant, or of all."""

    def delete(self, tenant_id: str, sha256: str) -> bool:
        """False where there was none."""

    def check_writable(self) -> None:
        """Raises StorageFull or Unavailable where an upload would."""

    def remove_stale_uploads(self, *, older_than_s: float = STALE_UPLOAD_S) -> int:
        """Take away what killed processes left behind, and return how many uploads that were."""
