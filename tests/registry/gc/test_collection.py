"""What a collection removes, what it leaves alone, and that it says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import delete, func, select, update

from registry.adapters.models import AdapterVersion
from registry.audit.models import AuditEvent
from registry.blobs.models import Blob, BlobReference
from registry.blobs.store import BlobStore
from registry.config import Settings
from registry.db import Database
from registry.jobs.models import Job, JobEvent
from registry.tenants.models import Tenant
from registry.uploads.models import LargeUpload
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.blobs.conformance import put
from tests.registry.gc.conftest import Collect, Pass, check_integrity, stored
from workers.schedule import start_if_due

Work = Callable[[], int]


def counts(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if value and name != "dry_run"}


def tenant_id(database: Database, name: str) -> str:
    with database.system_read() as session:
        return str(session.scalar(select(Tenant.id).where(Tenant.name == name)))


def weights_of(acme: Pusher, number: int) -> dict[str, Any]:
    files = acme.get(f"/adapters/pirate/versions/{number}", params={"show_deleted": True})["files"]
    return next(file for file in files if file["path"].endswith(".safetensors"))


@pytest.fixture
def pirate(acme: Pusher, work: Work) -> Pusher:
    """An adapter with two ready versions, which share their config."""
    for seed in (1, 2):
        acme.push("pirate", adapter(seed))
    work()
    return acme


@pytest.mark.postgresql
def test_a_deleted_version_goes_after_retention_and_hold(
    pirate: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, database: Database, settings: Settings
) -> None:
    weights = weights_of(pirate, 2)
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    before = stored(store)
    assert len(before) == 3
    pass_time(settings.deleted_retention_s - 60)
    assert counts(collect()) == {}, "it can still be restored"
    pass_time(120)
    assert counts(collect(dry_run=True)) == {"versions_purged": 1}
    assert pirate.get("/adapters/pirate/versions/2", params={"show_deleted": True})["purged_at"] is None
    assert counts(collect()) == {"versions_purged": 1}
    assert stored(store) == before, "somebody who was let in may still be reading"
    pass_time(settings.gc_hold_s + 1)
    expected = {"swept_blobs": 1, "swept_bytes": weights["size"]}
    assert counts(collect(dry_run=True)) == expected
    assert stored(store) == before, "a dry run removes nothing"
    assert counts(collect()) == expected
    assert stored(store) == before - {(tenant_id(database, "acme"), weights["sha256"])}
    check_integrity(database, store, collected=True)
    assert pirate.get("/adapters/pirate/versions/1")["status"] == "ready"
    with database.system_read() as session:
        [swept] = session.scalars(select(AuditEvent).where(AuditEvent.action == "blob.swept")).all()
    assert (swept.tenant_id, swept.resource_id, swept.before) == (
        tenant_id(database, "acme"),
        weights["sha256"],
        {"size": weights["size"]},
    )


def test_what_is_purged_by_request_goes_without_retention(
    pirate: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings
) -> None:
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    pirate.call("POST", "/adapters/pirate/versions/2/purge")
    assert counts(collect()) == {}
    pass_time(settings.gc_hold_s + 1)
    assert counts(collect())["swept_blobs"] == 1
    assert len(stored(store)) == 2
    back = pirate.push("pirate", adapter(2))
    assert (back.status_code, back.json()["number"], back.json()["status"]) == (200, 2, "pending")


@pytest.mark.postgresql
def test_a_blob_that_nobody_named_goes_after_the_grace(
    acme: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings, work: Work
) -> None:
    files = adapter(1).files
    acme.upload(files)
    pass_time(settings.gc_grace_s - 60)
    acme.upload({"adapter_config.json": files["adapter_config.json"]})
    pass_time(120)
    assert counts(collect())["swept_blobs"] == 1, "the other was uploaded again a minute ago"
    digest = hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
    assert acme.call("HEAD", f"/blobs/{digest}").status_code == 404
    refused = acme.call(
        "POST",
        "/adapters/pirate/versions",
        json={"files": {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}},
    )
    assert (refused.status_code, refused.json()["code"]) == (422, "blob_missing")
    assert acme.push("pirate", files).status_code == 201
    work()
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"
    assert len(stored(store)) == 2


@pytest.mark.postgresql
def test_bytes_without_a_row_go_after_the_grace(
    acme: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings, database: Database
) -> None:
    mine, stranger = tenant_id(database, "acme"), "f" * 32
    orphans = [put(store, mine, bytes([number]) * 10) for number in range(5)]
    put(store, stranger, b"another installation's")
    assert counts(collect()) == {}, "an upload may be about to record it"
    pass_time(settings.gc_grace_s + 1)
    expected = {"orphan_blobs": 5, "orphan_bytes": 50, "unknown_blobs": 1, "unknown_bytes": 22}
    assert counts(collect(dry_run=True)) == expected
    assert len(stored(store)) == 6
    assert counts(collect()) == expected
    assert stored(store) == {(stranger, hashlib.sha256(b"another installation's").hexdigest())}
    check_rows = acme.call("HEAD", f"/blobs/{orphans[0]}")
    assert check_rows.status_code == 404
    with database.system_read() as session:
        assert session.scalar(select(func.count()).select_from(Blob)) == 0


@pytest.mark.postgresql
def test_a_deleted_tenant_stops_at_once_and_its_bytes_go(
    pirate: Pusher, globex: Pusher, operator: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings, work: Work
) -> None:
    globex.push("pirate", adapter(1))
    work()
    theirs = 2
    operator.call("DELETE", "/tenants/acme")
    assert pirate.call("GET", "/adapters").status_code == 401
    assert pirate.client.get("/v1/models", headers=pirate.headers).status_code == 401
    assert [item["name"] for item in operator.get("/tenants")["items"]] == ["globex"]
    assert operator.call("POST", "/tenants/acme/restore").json()["deleted_at"] is None
    assert pirate.get("/adapters/pirate/versions/1")["status"] == "ready", "an accident is undone"
    assert operator.call("POST", "/tenants/acme/purge").json()["code"] == "tenant_not_deleted"
    operator.call("DELETE", "/tenants/acme")
    assert counts(collect()) == {}
    assert operator.call("POST", "/tenants/acme/purge").status_code == 202
    assert operator.call("POST", "/tenants/acme/restore").json()["code"] == "purged"
    assert counts(collect())["versions_purged"] == 2
    pass_time(settings.gc_hold_s + 1)
    assert counts(collect())["swept_blobs"] == 3
    assert len(stored(store)) == theirs
    assert globex.get("/adapters/pirate/versions/1")["status"] == "ready"


def test_a_tenant_deleted_long_ago_needs_no_request(
    pirate: Pusher, operator: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings
) -> None:
    pirate.call("POST", "/uploads", json={"sha256": "cd" * 32, "size": 5})
    operator.call("DELETE", "/tenants/acme")
    assert counts(collect()) == {"uploads_expired": 1}
    pass_time(settings.deleted_retention_s + 1)
    assert counts(collect())["versions_purged"] == 2
    pass_time(settings.gc_hold_s + 1)
    assert counts(collect())["swept_blobs"] == 3
    assert stored(store) == set()


def test_versions_of_an_older_program_get_their_references_first(
    pirate: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings, database: Database
) -> None:
    """While an upgrade rolls out, the old program records versions without references and deletes without a time."""
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    with database.system_write() as session:
        session.execute(delete(BlobReference))
        session.execute(update(Blob).values(touched_at=None))
        session.execute(update(AdapterVersion).values(deleted_at=None))
    pass_time(settings.gc_grace_s + 1)
    assert counts(collect()) == {"versions_indexed": 2}
    assert len(stored(store)) == 3
    check_integrity(database, store, collected=True)


@pytest.mark.postgresql
def test_late_uploads_end_and_old_rows_are_forgotten(
    acme: Pusher, collect: Collect, pass_time: Pass, *, settings: Settings, database: Database, work: Work
) -> None:
    acme.call("POST", "/uploads", json={"sha256": "cd" * 32, "size": 5})
    acme.push("pirate", adapter(1))
    work()
    pass_time(settings.upload_ttl_s + 1)
    assert counts(collect()) == {"uploads_expired": 1}
    pass_time(settings.job_retention_s)
    with database.system_read() as session:
        num_jobs = session.scalar(select(func.count()).select_from(Job))
    report = counts(collect())
    assert report == {"rows_removed": (num_jobs or 0) + 1}
    with database.system_read() as session:
        assert session.scalar(select(func.count()).select_from(LargeUpload)) == 0
        jobs_left = set(session.scalars(select(Job.id)))
        assert set(session.scalars(select(JobEvent.job_id))) <= jobs_left
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"


def test_an_upload_on_its_way_keeps_the_bytes_that_it_will_name(
    acme: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings
) -> None:
    digest = acme.upload({"f": b"12345"})["f"]
    acme.call("POST", "/uploads", json={"sha256": digest, "size": 5})
    pass_time(settings.upload_ttl_s - 60)
    pass_time(1)
    with_upload = settings.gc_grace_s - settings.upload_ttl_s + 120
    assert counts(collect()) == {}
    pass_time(with_upload)
    assert counts(collect()) == {"uploads_expired": 1, "swept_blobs": 1, "swept_bytes": 5}
    assert stored(store) == set()


def test_collections_are_started_once_and_listed(operator: Pusher, acme: Pusher, collect: Collect, database: Database) -> None:
    assert acme.call("POST", "/gc", json={}).status_code == 403
    assert operator.call("POST", "/gc", json={"dry": True}).status_code == 422
    first = operator.call("POST", "/gc", json={})
    again = operator.call("POST", "/gc", json={})
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["job_id"] == again.json()["job_id"]
    assert operator.call("GET", "/gc/nothing").status_code == 404
    assert not start_if_due(database, every_s=3600), "somebody has asked"
    collect()
    collect(dry_run=True)
    shown = operator.get("/gc")["items"]
    assert [(item["state"], item["dry_run"]) for item in shown] == [("succeeded", True), ("succeeded", False)]
    assert not start_if_due(database, every_s=3600)
    assert start_if_due(database, every_s=0)
    assert not start_if_due(database, every_s=0), "it is under way"


def test_a_grace_shorter_than_an_upload_or_a_grant_is_refused(settings: Settings) -> None:
    for shorter in ({"gc_grace_s": 3600.0}, {"gc_grace_s": 90_000.0, "grant_ttl_s": 100_000.0}):
        with pytest.raises(ValidationError, match="LORARY_GC_GRACE_S"):
            Settings(state_dir=settings.state_dir, **shorter)  # type: ignore[arg-type]
