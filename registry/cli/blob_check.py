"""Does the store hold what the database promises, byte for byte? Reads a page of rows and a chunk of bytes at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from registry.blobs.service import open_blob_store
from registry.blobs.store import BlobMissing, BlobStore
from registry.cli.failure import CliFailure
from registry.config import Settings
from registry.db import Database
from registry.errors import RegistryError
from registry.gc import repository, service
from registry.gc.models import BlobKey
from registry.gc.repository import Garbage

PAGE = 500
MAX_ITEMS = 1000

MISSING, TRUNCATED, CORRUPT, UNRECORDED = "missing", "truncated", "corrupt", "unrecorded"
Advance = Callable[[int], None]


@dataclass
class BlobReport:
    """`wrong` are lines "what tenant_id/sha256", at most MAX_ITEMS; `counts` of what is wrong, by word.

    unrecorded: a version needs it, and no row promises it. Unreferenced: the collector's business, and no fault.
    """

    total: int = 0
    checked: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    unreferenced_blobs: int = 0
    unreferenced_bytes: int = 0
    orphan_blobs: int = 0
    orphan_bytes: int = 0

    def add(self, what: str, tenant_id: str, sha256: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        if len(self.wrong) < MAX_ITEMS:
            self.wrong.append(f"{what} {tenant_id}/{sha256}")


def check_blobs(database: Database, settings: Settings, *, sample: int | None, advance: Advance) -> BlobReport:
    """Hash a random `sample` of the blobs, or all of them, and then also look for objects without rows.

    Raises CliFailure where the store does not answer.
    """
    report = BlobReport()
    try:
        _check(database, open_blob_store(settings), settings, report, sample=sample, advance=advance)
    except RegistryError as error:
        raise CliFailure(f"the blob store does not answer: {error.detail}", remedy="check LORARY_BLOB_URL and LORARY_S3_*") from error
    return report


def count_bytes(database: Database) -> int:
    """Of all blobs: how long a bar of progress is."""
    with database.system_read() as session:
        return repository.recorded_bytes(session)


def _check(database: Database, store: BlobStore, settings: Settings, report: BlobReport, *, sample: int | None, advance: Advance) -> None:
    with database.system_read() as session:
        report.total = repository.count_recorded(session)
        report.unreferenced_blobs, report.unreferenced_bytes = repository.count_unreferenced(session)
        chosen = None if sample is None else repository.sample_recorded(session, limit=sample)
        for key in repository.unrecorded(session, limit=MAX_ITEMS):
            report.add(UNRECORDED, key.tenant_id, key.sha256)
    for blob in _recorded(database) if chosen is None else chosen:
        what = _fault(store, blob, advance)
        report.checked += 1
        if what is not None:
            report.add(what, blob.tenant_id, blob.sha256)
    if sample is None:
        _count_orphans(database, store, settings, report)


def _recorded(database: Database) -> Iterator[Garbage]:
    after: BlobKey | None = None
    while True:
        with database.system_read() as session:
            page = repository.recorded_page(session, after=after, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        after = BlobKey(page[-1].tenant_id, page[-1].sha256)


def _fault(store: BlobStore, blob: Garbage, advance: Advance) -> str | None:
    size = store.size(blob.tenant_id, blob.sha256)
    if size != blob.size:
        return MISSING if size is None else TRUNCATED
    digest = hashlib.sha256()
    try:
        for chunk in store.stream(blob.tenant_id, blob.sha256):
            digest.update(chunk)
            advance(len(chunk))
    except BlobMissing:  # collected a moment ago
        return MISSING
    return None if digest.hexdigest() == blob.sha256 else CORRUPT


def _count_orphans(database: Database, store: BlobStore, settings: Settings, report: BlobReport) -> None:
    """What the collector would take by now. Younger ones may be on their way in."""
    for page in repository.pages(store.list(), size=PAGE):
        with database.system_read() as session:
            old = service.touched_before(session, settings)
            found = [Garbage(one.tenant_id, one.sha256, one.size) for one in page if one.stored_at < old]
            orphans = repository.without_rows(session, found)
        report.orphan_blobs += len(orphans)
        report.orphan_bytes += sum(one.size for one in orphans)
