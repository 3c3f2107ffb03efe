"""The seam between content addresses and where bytes lie. A store knows nothing of the database.

Keys are `tenant_id/sha256`: tenants share nothing, so that nobody can learn from a store what another tenant has.
Every store passes `tests/registry/blobs/conformance.py`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from registry.errors import Invalid, NotFound, TooLarge

CHUNK_BYTES = 1 << 20
STALE_UPLOAD_S = 24 * 3600.0


class BlobMissing(NotFound):
    """Absent, or another tenant's: both read the same."""

    code = "blob_missing"

    def __init__(self, sha256: str) -> None:
        super().__init__(
            f"there is no blob {sha256}; upload its bytes first", field="sha256", value=sha256, remedy=f"PUT /api/v1/blobs/{sha256}"
        )


class UploadLost(Invalid):
    """Parts of a large upload that the store no longer has."""

    code = "upload_lost"


def digest_mismatch(found: str, *, named: str) -> Invalid:
    return Invalid(
        f"the bytes hash to {found}, not to {named}; upload the bytes that the address names",
        field="sha256",
        value=named,
        remedy=f"upload them as {found}",
        code="digest_mismatch",
    )


def refuse_excess(size: int, *, max_bytes: int) -> None:
    """Raises TooLarge."""
    if size > max_bytes:
        raise TooLarge(
            f"the blob is larger than the {max_bytes} bytes allowed here; send larger ones in parts by POST /api/v1/uploads",
            field="body",
            value=f"more than {max_bytes} bytes",
            remedy=f"stay within {max_bytes} bytes",
        )


@dataclass(frozen=True)
class StoredBlob:
    """What lies in a store, for the sweep that compares it with the rows."""

    tenant_id: str
    sha256: str
    size: int
    stored_at: dt.datetime


@dataclass(frozen=True)
class PartedUpload:
    """One large blob on its way in by parts. `handle` is the store's own name for it; parts are numbered from 1."""

    tenant_id: str
    upload_id: str
    handle: str
    size: int
    part_bytes: int

    @property
    def num_parts(self) -> int:
        return max(1, -(-self.size // self.part_bytes))

    def size_of(self, number: int) -> int:
        return min(self.part_bytes, self.size - (number - 1) * self.part_bytes)


def upload_lost(upload: PartedUpload) -> UploadLost:
    return UploadLost(
        f"the parts of upload {upload.upload_id} are gone from the store; begin it again",
        field="upload_id",
        value=upload.upload_id,
        remedy="POST /api/v1/uploads",
    )


def refuse_part_size(upload: PartedUpload, number: int, *, found: int) -> None:
    """Raises Invalid unless the part has the size that its number says."""
    size = upload.size_of(number)
    if found != size:
        raise Invalid(
            f"part {number} has {found} bytes and must have {size}; send it again whole",
            field="body",
            value=found,
            remedy=f"send {size} bytes",
            code="part_size",
        )


class Upload(Protocol):
    """One blob on its way in. Nothing is visible before `commit`; nothing stays behind after `abort`."""

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge over the bound given to `begin`, StorageFull when the disk is."""

    def commit(self) -> int:
        """Make the bytes durable and visible at once, and return their number. Raises Invalid on a wrong digest."""

    def abort(self) -> None:
        """Leave nothing behind. Harmless after `commit` and when called again."""


class PartStore(Protocol):
    """Large uploads by parts. Parts lie apart from every content address; only `finalise` makes a blob of them."""

    def begin_parts(self, tenant_id: str, upload_id: str) -> str:
        """Make room for parts; returns the handle."""

    def part_url(self, upload: PartedUpload, number: int, *, ttl_s: int) -> str | None:
        """Where a client may PUT one part without passing the API, for `ttl_s` seconds; None: it must pass it."""

    def begin_part(self, upload: PartedUpload, number: int) -> Upload:
        """One part through the API. `commit` raises Invalid for a wrong size; the last one to commit a number counts."""

    def parts(self, upload: PartedUpload) -> dict[int, int]:
        """Bytes by number, of the parts that have arrived. Raises UploadLost."""

    def finalise(self, upload: PartedUpload, *, sha256: str, check: Callable[[], None]) -> None:
        """Hash the joined parts, and only then let them appear at their address, at once.

        May be called again after a crash at any moment. `check` is called every CHUNK_BYTES or so and may raise.
        Raises Invalid (digest_mismatch), with nothing kept, and UploadLost.
        """

    def discard_parts(self, upload: PartedUpload) -> None:
        """Remove what arrived. Harmless when called again."""


class BlobStore(PartStore, Protocol):
    def begin(self, tenant_id: str, sha256: str, *, max_bytes: int) -> Upload:
        """Start an upload. Bytes that are already there are replaced by equal ones, which heals a damaged disk."""

    def size(self, tenant_id: str, sha256: str) -> int | None:
        """Bytes of a blob, or None where there is none."""

    def open(self, tenant_id: str, sha256: str) -> BinaryIO:
        """A seekable file. Raises BlobMissing."""

    def stream(self, tenant_id: str, sha256: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes [start, start + length) in bounded chunks. Raises BlobMissing at the call, not at the first chunk."""

    def list(self, tenant_id: str | None = None, *, after: tuple[str, str] | None = None) -> Iterator[StoredBlob]:
        """Every blob of one tenant, or of all, in order of (tenant_id, sha256); only those beyond `after`."""

    def delete(self, tenant_id: str, sha256: str) -> bool:
        """False where there was none."""

    def download_url(self, tenant_id: str, sha256: str, *, ttl_s: int) -> str | None:
        """Where a client may GET the bytes without passing the API, for `ttl_s` seconds; None: nowhere."""

    def check_writable(self) -> None:
        """Raises StorageFull or Unavailable where an upload would."""

    def remove_stale_uploads(self, *, older_than_s: float = STALE_UPLOAD_S) -> int:
        """Take away what killed processes left behind, and return how many uploads that were."""
