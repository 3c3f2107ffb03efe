"""A registry whose garbage collector runs when a test says so, and time that passes when a test says so."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select, update

from registry.adapters.models import AdapterVersion
from registry.blobs.models import Blob
from registry.blobs.service import open_blob_store
from registry.blobs.store import BlobStore
from registry.config import Settings
from registry.db import Database, open_database
from registry.jobs.models import Job
from registry.jobs.service import COLLECT_GARBAGE
from registry.tenants.models import Tenant
from registry.uploads.models import LargeUpload
from tests.registry.adapters.conftest import acme, base_model, globex, operator, work, worker
from tests.registry.adapters.pushing import Pusher
from tests.registry.places import make_place, s3_settings
from workers.collect import GarbageCollection
from workers.shell import JobKind, Worker

__all__ = ["acme", "base_model", "globex", "operator", "work", "worker"]

Collect = Callable[..., dict[str, Any]]
Pass = Callable[[float], None]


@pytest.fixture
def store_kind(request: pytest.FixtureRequest) -> str:
    """`local`, unless a test asks for `s3` by indirect parameters."""
    return str(getattr(request, "param", "local"))


@pytest.fixture
def settings(settings: Settings, store_kind: str, request: pytest.FixtureRequest) -> Settings:
    changes: dict[str, object] = {"gc_rate": 0.0, "gc_slice_s": 3600.0}
    if store_kind == "s3":
        place = make_place(request.getfixturevalue("s3_server"))
        changes |= {"blob_url": place.url, "s3": s3_settings(place.server, max_attempts=1)}
    return settings.model_copy(update=changes)


@pytest.fixture
def store(settings: Settings) -> BlobStore:
    return open_blob_store(settings)


@pytest.fixture
def worker_database(settings: Settings, database: Database) -> Iterator[Database]:
    """With a worker's roles, not the tests'."""
    own = open_database(settings)
    yield own
    own.close()


@pytest.fixture
def collector(settings: Settings, store: BlobStore, worker_database: Database) -> GarbageCollection:
    return GarbageCollection(worker_database, store, settings, page=3)


def worker_of(collector: GarbageCollection) -> Worker:
    kinds = {COLLECT_GARBAGE: JobKind(run=collector.run, give_up=collector.give_up)}
    return Worker(collector.database, kinds=kinds, lease_s=30, poll_s=0.05)


@pytest.fixture
def collect(collector: GarbageCollection, operator: Pusher) -> Collect:
    """collect(dry_run=False) -> the report of a whole collection."""

    def run(*, dry_run: bool = False) -> dict[str, Any]:
        job_id = operator.call("POST", "/gc", json={"dry_run": dry_run}).json()["job_id"]
        assert worker_of(collector).run_one()
        shown = operator.get(f"/gc/{job_id}")
        assert shown["state"] == "succeeded", shown
        return dict(shown["report"])

    return run


@pytest.fixture
def pass_time(database: Database, settings: Settings, store_kind: str) -> Pass:
    """pass_time(s): everything that the collector compares with its clock becomes that much older. S3's own times stay."""

    def older(session: Any, model: Any, *columns: str) -> None:
        keys = [column.name for column in model.__table__.primary_key]
        for row in session.scalars(select(model)).all():
            values = {name: getattr(row, name) - dt.timedelta(seconds=seconds[0]) for name in columns if getattr(row, name) is not None}
            if values:
                own = [getattr(model, key) == getattr(row, key) for key in keys]
                session.execute(update(model).where(*own).values(**values), execution_options={"synchronize_session": False})

    seconds = [0.0]

    def run(by: float) -> None:
        seconds[0] = by
        with database.write() as session:
            older(session, Blob, "created_at", "touched_at", "deleting_until")
            older(session, AdapterVersion, "deleted_at")
            older(session, Tenant, "deleted_at")
            older(session, LargeUpload, "expires_at")
            older(session, Job, "finished_at")
        if store_kind == "local":
            for path in settings.blob_dir.glob("*/*"):
                if path.parent.name != ".uploads":
                    status = path.stat()
                    os.utime(path, (status.st_atime - by, status.st_mtime - by))

    return run


def stored(store: BlobStore) -> set[tuple[str, str]]:
    return {(blob.tenant_id, blob.sha256) for blob in store.list()}


def check_integrity(database: Database, store: BlobStore, *, collected: bool) -> None:
    """Every version that could be served or restored has its bytes; after a collection nothing else lies in the store."""
    with database.system_read() as session:
        versions = session.scalars(select(AdapterVersion).where(AdapterVersion.purged_at.is_(None))).all()
        rows = {(blob.tenant_id, blob.sha256): blob.size for blob in session.scalars(select(Blob))}
    needed = {(version.tenant_id, file["sha256"]) for version in versions for file in version.manifest["files"]}
    there = {(blob.tenant_id, blob.sha256): blob.size for blob in store.list()}
    assert needed - there.keys() == set(), "a version has lost its bytes"
    assert needed - rows.keys() == set(), "a version has lost the rows of its bytes"
    assert {key: size for key, size in rows.items() if there.get(key) != size} == {}, "a row promises what is not there"
    if collected:
        assert there.keys() - needed == set(), "bytes that nobody needs"
        assert rows.keys() - needed == set(), "rows that nobody needs"
