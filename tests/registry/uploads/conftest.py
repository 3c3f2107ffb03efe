"""A registry over each kind of store, small parts, and a worker that finalises."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy import func, select

from registry.blobs.service import open_blob_store
from registry.blobs.store import BlobStore
from registry.config import Settings
from registry.db import Database
from registry.jobs.models import Job
from registry.jobs.service import FINALISE_UPLOAD
from tests.registry.conftest import MakeTenant, bearer
from tests.registry.places import make_place, s3_settings
from workers.finalise import UploadFinaliser
from workers.shell import JobKind, Worker

PART = 5 << 20  # what S3 asks for at least


@pytest.fixture(params=["local", "s3 direct", "s3 through the API"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(settings: Settings, kind: str, request: pytest.FixtureRequest) -> Settings:
    changes: dict[str, object] = {"upload_part_bytes": PART, "max_open_uploads": 3}
    if kind.startswith("s3"):
        place = make_place(request.getfixturevalue("s3_server"))
        changes |= {"blob_url": place.url, "s3": s3_settings(place.server, direct_uploads=kind == "s3 direct")}
    return settings.model_copy(update=changes)


@pytest.fixture
def store(settings: Settings) -> BlobStore:
    return open_blob_store(settings)


@pytest.fixture
def key(make_tenant: MakeTenant) -> dict[str, str]:
    return bearer(make_tenant("acme"))


@pytest.fixture
def finalise(database: Database, store: BlobStore) -> Callable[[], bool]:
    """Runs jobs until none is left, also those that are tried again because the store failed."""
    finaliser = UploadFinaliser(database, store)
    kinds = {FINALISE_UPLOAD: JobKind(run=finaliser.run, give_up=finaliser.give_up)}
    worker = Worker(database, kinds=kinds, lease_s=30, poll_s=0.1)

    def run() -> bool:
        deadline = time.monotonic() + 30
        while _unfinished(database):
            assert time.monotonic() < deadline, "the upload was never finalised"
            worker.run_one()
            time.sleep(0.01)
        return True

    return run


def _unfinished(database: Database) -> int:
    with database.system_read() as session:
        return session.scalar(select(func.count()).select_from(Job).where(Job.finished_at.is_(None))) or 0
