"""The job of kind `collect_garbage`: purge, sweep, and look through the store, a page at a time.

It is nobody's tenant's, so its transactions cross tenants. Everything that it removes is marked in its own row first, so
it may die anywhere: the next attempt or collection goes on. It works for a slice of time and then lets other jobs go first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import structlog

from registry.blobs.store import STALE_UPLOAD_S, BlobStore
from registry.config import Settings
from registry.db import Database, WriteSession
from registry.errors import RegistryError
from registry.gc import repository, service
from registry.gc.models import DONE, INDEX, ORPHANS, PURGE, ROWS, SWEEP, UPLOADS, BlobKey, Collection
from registry.gc.repository import Garbage
from registry.jobs import repository as job_rows
from registry.jobs import service as jobs
from registry.jobs.service import Claim
from registry.uploads import service as uploads
from workers.shell import Attempt, GivesWay, Publish

log = structlog.get_logger(__name__)

PAGE = 200
TELL_S = 1.0
REMOVERS = 8
HOLD_S = 900.0
"""How long a taken row is ours. A removal starts in the first half of it, so that with all its retries it is over before
somebody else may take the row or upload the bytes again."""


@dataclass(frozen=True)
class GarbageCollection:
    """Payload {dry_run}. `hold_s` and `page` are for tests."""

    database: Database
    store: BlobStore
    settings: Settings
    hold_s: float = HOLD_S
    page: int = PAGE

    def run(self, claim: Claim, attempt: Attempt) -> Publish:
        with self.database.read() as session:
            job = job_rows.find(session, None, claim.job_id)
            assert job is not None, "claimed a moment ago"
            collection = service.progress_of(job)
        run = _Run(self, claim, attempt, collection)
        try:
            run.go_on()
        finally:
            run.removers.shutdown(cancel_futures=True)
        return lambda session: service.finish(session, claim.job_id, collection)

    def give_up(self, _session: WriteSession, _tenant_id: str | None, _payload: Mapping[str, Any], _code: str, _detail: str) -> None:
        """Nothing waits for a collection; the next one goes on with what this one took."""


@dataclass
class _Run:
    """One slice of one attempt. `token` marks the rows that it takes."""

    job: GarbageCollection
    claim: Claim
    attempt: Attempt
    collection: Collection
    token: str = field(default_factory=lambda: uuid4().hex)
    started_at: float = field(default_factory=time.monotonic)
    told_at: float = field(default_factory=time.monotonic)
    removers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(REMOVERS, thread_name_prefix="gc"))

    def go_on(self) -> None:
        """From the step where the last one stopped to the end. Raises GivesWay when the slice is over."""
        steps: dict[str, tuple[Callable[[], None], str]] = {
            INDEX: (self._index, PURGE),
            PURGE: (self._purge, UPLOADS),
            UPLOADS: (self._uploads, SWEEP),
            SWEEP: (self._sweep, ORPHANS),
            ORPHANS: (self._orphans, ROWS),
            ROWS: (self._rows, DONE),
        }
        while not self.collection.is_over:
            step, then = steps[self.collection.step]
            step()
            self.collection.go_to(then)
            self._tell()

    # ---- steps ----

    def _index(self) -> None:
        """Also in a dry run: it tells what is there, and changes nothing that anybody sees."""
        while True:
            with self.job.database.write() as session:
                num_indexed = service.index_page(session, limit=self.job.page)
            if not num_indexed:
                return
            self.collection.versions_indexed += num_indexed
            self._turn()

    def _purge(self) -> None:
        if self.collection.dry_run:
            with self.job.database.read() as session:
                before = service.deleted_before(session, self.job.settings)
                self.collection.versions_purged = repository.count_versions_to_purge(session, deleted_before=before)
            return
        while True:
            with self.job.database.read() as session:
                before = service.deleted_before(session, self.job.settings)
                keys = repository.versions_to_purge(session, deleted_before=before, limit=self.job.page)
            for key in keys:
                with self.job.database.write() as session:
                    self.collection.versions_purged += service.purge_version(session, key, settings=self.job.settings)
                self._turn()
            if not keys:
                return

    def _uploads(self) -> None:
        if self.collection.dry_run:
            with self.job.database.read() as session:
                self.collection.uploads_expired = repository.count_overdue_uploads(session)
            return
        while True:
            with self.job.database.read() as session:
                late = repository.overdue_uploads(session, limit=self.job.page)
            for tenant_id, upload_id in late:
                self.collection.uploads_expired += uploads.end_late(self.job.database, self.job.store, tenant_id, upload_id)
                self._turn()
            if not late:
                break
        older_than_s = max(STALE_UPLOAD_S, 2 * self.job.settings.upload_ttl_s)
        self.collection.uploads_discarded += self.job.store.remove_stale_uploads(older_than_s=older_than_s)

    def _sweep(self) -> None:
        while True:
            with self.job.database.read() as session:
                until = repository.end_of_page(session, self.collection.after, limit=self.job.page)
                if until is None:
                    return
                touched_before = service.touched_before(session, self.job.settings)
                found = repository.garbage(session, after=self.collection.after, until=until, touched_before=touched_before)
            if found and not self.collection.dry_run:
                taken_at = time.monotonic()
                with self.job.database.write() as session:
                    found = repository.take(session, found, by=self.token, hold_s=self.job.hold_s, touched_before=touched_before)
                found = self._remove(found, taken_at=taken_at)
            self.collection.swept_blobs += len(found)
            self.collection.swept_bytes += sum(one.size for one in found)
            self.collection.after = until
            self._turn(num_removed=len(found))

    def _orphans(self) -> None:
        after = self.collection.after
        listed = self.job.store.list(after=None if after is None else (after.tenant_id, after.sha256))
        for page in repository.pages(listed, size=self.job.page):
            with self.job.database.read() as session:
                old = service.touched_before(session, self.job.settings)
                found = [Garbage(one.tenant_id, one.sha256, one.size) for one in page if one.stored_at < old]
                known = repository.known_tenants(session, {one.tenant_id for one in found})
                mine = repository.without_rows(session, [one for one in found if one.tenant_id in known])
            unknown = [one for one in found if one.tenant_id not in known]
            self.collection.unknown_blobs += len(unknown)
            self.collection.unknown_bytes += sum(one.size for one in unknown)
            if mine and not self.collection.dry_run:
                taken_at = time.monotonic()
                with self.job.database.write() as session:
                    mine = repository.take_orphans(session, mine, by=self.token, hold_s=self.job.hold_s)
                mine = self._remove(mine, taken_at=taken_at)
            self.collection.orphan_blobs += len(mine)
            self.collection.orphan_bytes += sum(one.size for one in mine)
            self.collection.after = BlobKey(page[-1].tenant_id, page[-1].sha256)
            self._turn(num_removed=len(mine))

    def _rows(self) -> None:
        if not self.job.settings.job_retention_s:
            return
        while True:
            if self.collection.dry_run:
                with self.job.database.read() as session:
                    self.collection.rows_removed = repository.count_ended(session, before=service.ended_before(session, self.job.settings))
                return
            with self.job.database.write() as session:
                before = service.ended_before(session, self.job.settings)
                num_removed = repository.remove_ended(session, before=before, limit=self.job.page)
            if not num_removed:
                return
            self.collection.rows_removed += num_removed
            self._turn()

    # ---- the bytes ----

    def _remove(self, taken: list[Garbage], *, taken_at: float) -> list[Garbage]:
        """Take the bytes of taken rows out of the store, then the rows. Returns those that are gone.

        What the store may or may not have removed stays taken until its time is up; what was not asked of it is put back.
        Raises what the store raised.
        """
        removal = _Removal(self.job.store, until=taken_at + self.job.hold_s / 2)
        gone = [one for one, is_gone in zip(taken, self.removers.map(removal.remove, taken), strict=True) if is_gone]
        with self.job.database.write() as session:
            service.settle(session, gone, by=self.token)
            repository.put_back(session, removal.untouched, by=self.token)
        if removal.error is not None:
            raise removal.error
        return gone

    # ---- between pages ----

    def _turn(self, *, num_removed: int = 0) -> None:
        """After each page: is this job still ours, has it gone too fast, has it had its time?"""
        self.attempt.check()
        now = time.monotonic()
        if now - self.started_at >= self.job.settings.gc_slice_s:
            self._tell()
            raise GivesWay
        if now - self.told_at >= TELL_S:
            self._tell()
        self._pause(num_removed / self.job.settings.gc_rate if self.job.settings.gc_rate else 0.0)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            self.attempt.check()

    def _tell(self) -> None:
        self.told_at = time.monotonic()
        with self.job.database.write() as session:
            jobs.progress(session, self.claim, self.collection.to_json())


class _Removal:
    """Removes bytes from several threads until one fails or the time is up."""

    def __init__(self, store: BlobStore, *, until: float) -> None:
        self._store = store
        self._until = until
        self._stop = threading.Event()
        self.error: RegistryError | OSError | None = None
        self.untouched: list[Garbage] = []

    def remove(self, one: Garbage) -> bool:
        if self._stop.is_set() or time.monotonic() > self._until:
            self.untouched.append(one)
            return False
        try:
            self._store.delete(one.tenant_id, one.sha256)
        except (RegistryError, OSError) as error:
            log.warning("gc.not_removed", tenant_id=one.tenant_id, sha256=one.sha256, error=str(error))
            self.error = error
            self._stop.set()
            return False
        return True
