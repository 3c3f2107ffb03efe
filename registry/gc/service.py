"""Rules of garbage collection: who starts one, and the short transactions that it is made of.

    index     versions of a program before references get theirs
    purge     versions deleted longer ago than the retention time, or whose tenant is gone, give up their hold on bytes
    uploads   uploads whose time is over end, and what killed processes left in the store goes
    sweep     blobs that nobody needs leave the store, then the database
    orphans   so do objects that no row promises
    rows      jobs and uploads that ended long ago are forgotten

`workers/collect.py` goes through these steps as a job of nobody's tenant. Two at once do no harm.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection as Several
from typing import Any

from registry.adapters import deletion
from registry.adapters import repository as adapters
from registry.adapters.models import DELETED
from registry.audit import service as audit
from registry.blobs import repository as blobs
from registry.config import Settings
from registry.db import ReadSession, WriteSession, database_time
from registry.gc import repository
from registry.gc.models import Collection
from registry.gc.repository import Garbage, VersionKey
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.tenants.auth import SYSTEM, Subject

MAX_ATTEMPTS = 10  # about four minutes without store or database; the next collection goes on after that


def start(session: WriteSession, subject: Subject, *, dry_run: bool) -> tuple[Job, bool]:
    """The collection that is under way, or a new one (True)."""
    repository.lock_schedule(session)
    live = repository.live_collection(session, dry_run=dry_run)
    if live is not None:
        return live, False
    payload = {"dry_run": dry_run}
    job = jobs.enqueue(
        session, kind=jobs.COLLECT_GARBAGE, tenant_id=None, subject_id=subject.key_id, payload=payload, max_attempts=MAX_ATTEMPTS
    )
    audit.record(session, subject, "garbage.collection_started", "job", job.id, after=payload)
    return job, True


def is_due(session: ReadSession, *, every_s: float) -> bool:
    """Whether nobody has asked for a collection for so long."""
    last = repository.last_collection(session)
    return last is None or last.created_at <= database_time(session) - dt.timedelta(seconds=every_s)


def start_if_due(session: WriteSession, *, every_s: float) -> bool:
    repository.lock_schedule(session)
    return is_due(session, every_s=every_s) and start(session, SYSTEM, dry_run=False)[1]


def progress_of(job: Job) -> Collection:
    """Where an earlier attempt or slice of this job stopped."""
    return Collection.from_json({"dry_run": bool(job.payload.get("dry_run")), **(job.progress or {})})


def index_page(session: WriteSession, *, limit: int) -> int:
    """Give references to versions that have none. Returns how many versions that were."""
    repository.mark_deletion_times(session)
    versions = repository.unindexed_versions(session, limit=limit)
    for version in versions:
        adapters.lock_adapter(session, version.tenant_id, version.adapter_id)
        digests = {file["sha256"] for file in version.manifest["files"]}
        digests |= {blob["sha256"] for form in version.forms for blob in form.manifest["blobs"].values()}
        blobs.refer(session, version.tenant_id, version.id, digests)
    return len(versions)


def deleted_before(session: ReadSession, settings: Settings) -> dt.datetime | None:
    """What was deleted before then has had its time to be restored. None: there is no end to that time."""
    if not settings.deleted_retention_s:
        return None
    return database_time(session) - dt.timedelta(seconds=settings.deleted_retention_s)


def purge_version(session: WriteSession, key: VersionKey, *, settings: Settings) -> bool:
    """Purge what is to be purged. False where it was restored or purged meanwhile."""
    adapter = adapters.lock_adapter(session, key.tenant_id, key.adapter_id)
    if not repository.is_to_purge(session, key, deleted_before=deleted_before(session, settings)):
        return False
    version = repository.version_to_purge(session, key.version_id)
    assert version is not None, "rows of versions are never removed"
    if version.status != DELETED:  # of a tenant that is gone
        version.status = DELETED
        version.deleted_at = adapter.deleted_at = adapter.deleted_at or database_time(session)
    deletion.purge(session, SYSTEM, version, settings=settings)
    return True


def touched_before(session: ReadSession, settings: Settings) -> dt.datetime:
    """What nobody has touched since then has had its grace."""
    return database_time(session) - dt.timedelta(seconds=settings.gc_grace_s)


def ended_before(session: ReadSession, settings: Settings) -> dt.datetime:
    return database_time(session) - dt.timedelta(seconds=settings.job_retention_s)


def settle(session: WriteSession, gone: Several[Garbage], *, by: str) -> None:
    """The bytes are gone: so are the rows, and each tenant's audit trail says so."""
    repository.settle(session, gone, by=by)
    for one in gone:
        audit.record(session, SYSTEM, "blob.swept", "blob", one.sha256, before={"size": one.size}, tenant_id=one.tenant_id)


def finish(session: WriteSession, job_id: str, collection: Collection) -> dict[str, Any]:
    """The job's result."""
    report = collection.report()
    audit.record(session, SYSTEM, "garbage.collected", "job", job_id, after=report)
    return report
