"""The collector against everybody else: pushes, uploads, pulls, other collectors, and a store or database that goes away."""

from __future__ import annotations

import datetime as dt
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from registry.blobs import service as blobs
from registry.blobs.models import Blob
from registry.blobs.store import BlobStore
from registry.config import Settings
from registry.db import Database, database_time
from registry.errors import Unavailable
from registry.gc import service
from registry.jobs.models import Job
from registry.tenants.auth import SYSTEM
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.gc.conftest import Collect, Pass, check_integrity, stored, worker_of
from tests.registry.gc.test_collection import counts
from workers.collect import GarbageCollection
from workers.shell import Worker

Work = Callable[[], int]
STORES = pytest.mark.parametrize("store_kind", ["local", pytest.param("s3", marks=pytest.mark.full)], indirect=True)
FILES = adapter(1).files


class Gate:
    """A store that stops before or after it removes bytes, until it is let go. Everything else is the real store's."""

    def __init__(self, store: BlobStore, *, when: str) -> None:
        self._store, self._when = store, when
        self.reached, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, tenant_id: str, sha256: str) -> bool:
        if self._when == "after":
            self._store.delete(tenant_id, sha256)
        self.reached.set()
        assert self.go.wait(30)
        return self._store.delete(tenant_id, sha256) if self._when == "before" else True


class Failing:
    """A store that is away for its first `times` removals; before or after it has done them."""

    def __init__(self, store: BlobStore, *, times: int, done: bool) -> None:
        self._store, self._left, self._done = store, times, done
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, tenant_id: str, sha256: str) -> bool:
        with self._lock:
            self._left -= 1
            fails = self._left >= 0
        if not fails or self._done:
            self._store.delete(tenant_id, sha256)
        if fails:
            raise Unavailable("the blob store does not answer", retry_after_s=1)
        return True


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], object]], Any]]:
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def start(database: Database) -> None:
    with database.system_write() as session:
        service.start(session, SYSTEM, dry_run=False)


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


def name(acme: Pusher, files: dict[str, bytes] = FILES) -> Any:
    """Name blobs as a version without uploading them."""
    return acme.call("POST", "/adapters/pirate/versions", json={"files": digests(files)})


@STORES
@pytest.mark.postgresql
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_push_in_the_middle_of_a_sweep_is_told_to_upload_again(
    acme: Pusher,
    collector: GarbageCollection,
    pass_time: Pass,
    in_background: Any,
    *,
    when: str,
    store: BlobStore,
    settings: Settings,
    database: Database,
    work: Work,
) -> None:
    acme.upload(FILES)
    pass_time(settings.gc_grace_s + 1)
    start(database)
    gate = Gate(store, when=when)
    sweeping = in_background(worker_of(replace(collector, store=gate)).run_one)  # type: ignore[arg-type]
    assert gate.reached.wait(30)
    refused = name(acme)
    assert (refused.status_code, refused.json()["code"]) == (422, "blob_missing")
    digest = digests(FILES)["adapter_config.json"]
    assert acme.call("HEAD", f"/blobs/{digest}").status_code == 404
    busy = acme.call("PUT", f"/blobs/{digest}", content=FILES["adapter_config.json"])
    assert (busy.status_code, busy.json()["code"]) == (503, "blob_being_removed")
    gate.go.set()
    assert sweeping.result(30)
    assert acme.push("pirate", FILES).status_code == 201
    work()
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"
    check_integrity(database, store, collected=True)


@STORES
@pytest.mark.postgresql
def test_an_upload_that_found_garbage_in_place_is_not_promised(
    acme: Pusher,
    collector: GarbageCollection,
    pass_time: Pass,
    app: FastAPI,
    monkeypatch: pytest.MonkeyPatch,
    *,
    store: BlobStore,
    settings: Settings,
    database: Database,
) -> None:
    """Its bytes lay there, S3 did not take them again, and the sweep ended between that and the row."""
    digest = acme.upload({"f": b"12345"})["f"]
    pass_time(settings.gc_grace_s + 1)
    begin = app.state.blob_store.begin

    def sweep_at_commit(*arguments: Any, **options: Any) -> Any:
        upload = begin(*arguments, **options)
        commit = upload.commit

        def commit_then_sweep() -> int:
            size = int(commit())
            start(database)
            assert worker_of(collector).run_one()
            return size

        upload.commit = commit_then_sweep
        return upload

    monkeypatch.setattr(app.state.blob_store, "begin", sweep_at_commit)
    busy = acme.call("PUT", f"/blobs/{digest}", content=b"12345")
    assert (busy.status_code, busy.json()["code"]) == (503, "blob_being_removed")
    monkeypatch.undo()
    check_integrity(database, store, collected=True)
    assert acme.call("PUT", f"/blobs/{digest}", content=b"12345").status_code == 201
    assert acme.call("GET", f"/blobs/{digest}").content == b"12345"


@pytest.mark.postgresql
def test_pushes_and_collections_at_once_never_lose_bytes(
    acme: Pusher, collector: GarbageCollection, *, store: BlobStore, database: Database, work: Work, settings: Settings
) -> None:
    """Everything is garbage the moment it is let go: no grace at all, so that every push races a sweep."""
    eager = replace(collector, settings=settings.model_copy(update={"gc_grace_s": -60.0, "presigned_ttl_s": 0, "grant_ttl_s": 0.0}))
    over = threading.Event()

    def sweep() -> int:
        worker, rounds = worker_of(eager), 0
        while not over.is_set():
            start(database)
            worker.run_one()
            rounds += 1
        return rounds

    def push(number: int) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if acme.call("GET", f"/adapters/a{number}").status_code == 200:
                return number
            for data in FILES.values():
                acme.call("PUT", f"/blobs/{hashlib.sha256(data).hexdigest()}", content=data)
            acme.call("POST", f"/adapters/a{number}/versions", json={"files": digests(FILES)})
        return -1

    with ThreadPoolExecutor(3) as pool:
        sweeping = pool.submit(sweep)
        done = list(pool.map(push, range(6)))
        over.set()
        assert sweeping.result(60) > 0
    assert -1 not in done, "a push never got through"
    work()
    for number in done:
        assert acme.get(f"/adapters/a{number}/versions/1")["status"] == "ready"
    check_integrity(database, store, collected=False)


@pytest.mark.postgresql
def test_two_collectors_share_the_work(
    acme: Pusher, collector: GarbageCollection, pass_time: Pass, *, store: BlobStore, database: Database, settings: Settings
) -> None:
    acme.upload({str(number): bytes([number]) for number in range(40)})
    pass_time(settings.gc_grace_s + 1)
    with database.system_write() as session:
        jobs = [service.start(session, SYSTEM, dry_run=False)[0]]
        session.execute(update(Job).where(Job.id == jobs[0].id).values(payload={"dry_run": None}))  # hidden from the next start
        jobs.append(service.start(session, SYSTEM, dry_run=False)[0])
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: worker_of(collector).run_one(), range(2)))
    with database.system_read() as session:
        reports = [job.result or {} for job in session.scalars(select(Job).where(Job.id.in_([job.id for job in jobs])))]
    assert sum(report["swept_blobs"] for report in reports) == 40, "each blob is counted by the one that removed it"
    assert stored(store) == set()
    check_integrity(database, store, collected=True)


@pytest.mark.postgresql
@pytest.mark.parametrize("done", [False, True])
def test_a_store_that_goes_away_is_waited_for(
    acme: Pusher,
    collector: GarbageCollection,
    pass_time: Pass,
    operator: Pusher,
    *,
    done: bool,
    store: BlobStore,
    database: Database,
    settings: Settings,
) -> None:
    """Also where it did what it was asked and could not say so."""
    acme.upload({str(number): bytes([number]) for number in range(5)})
    pass_time(settings.gc_grace_s + 1)
    start(database)
    worker = worker_of(replace(collector, store=Failing(store, times=1, done=done)))  # type: ignore[arg-type]
    _until_over(worker, database)
    assert operator.get("/gc")["items"][0]["state"] == "succeeded"
    pass_time(1000)  # what may have been half done is somebody else's after its hold
    start(database)
    assert worker.run_one()
    assert stored(store) == set()
    check_integrity(database, store, collected=True)


def test_a_database_that_goes_away_is_waited_for(
    acme: Pusher,
    collector: GarbageCollection,
    pass_time: Pass,
    monkeypatch: pytest.MonkeyPatch,
    *,
    store: BlobStore,
    database: Database,
    settings: Settings,
) -> None:
    """Between the removal of the bytes and of the rows."""
    acme.upload({str(number): bytes([number]) for number in range(5)})
    pass_time(settings.gc_grace_s + 1)
    start(database)
    settle, failures = service.settle, [0]

    def away_once(*arguments: Any, **options: Any) -> None:
        failures[0] += 1
        if failures[0] == 1:
            raise OperationalError("DELETE", {}, Exception("the database is away"))
        settle(*arguments, **options)

    monkeypatch.setattr(service, "settle", away_once)
    _until_over(worker_of(collector), database)
    pass_time(1000)
    start(database)
    assert worker_of(collector).run_one()
    assert stored(store) == set()
    check_integrity(database, store, collected=True)


def test_it_lets_other_jobs_go_first_and_goes_on(
    acme: Pusher,
    collector: GarbageCollection,
    pass_time: Pass,
    operator: Pusher,
    *,
    store: BlobStore,
    database: Database,
    settings: Settings,
) -> None:
    acme.upload({str(number): bytes([number]) for number in range(10)})
    pass_time(settings.gc_grace_s + 1)
    start(database)
    worker = worker_of(replace(collector, settings=settings.model_copy(update={"gc_slice_s": 1e-6})))
    slices = 0
    while operator.get("/gc")["items"][0]["state"] != "succeeded":
        assert worker.run_one()
        slices += 1
        assert slices < 50
    assert slices >= 4, "a page each"
    [item] = operator.get("/gc")["items"]
    assert counts(item["report"]) == {"swept_blobs": 10, "swept_bytes": 10}
    assert operator.get(f"/jobs/{item['job_id']}")["attempt"] == 1, "giving way is no failure"
    assert stored(store) == set()


def test_a_pull_in_the_middle_gets_all_its_bytes(
    acme: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, settings: Settings, work: Work
) -> None:
    """A replica's grant, or a download URL, is good for at most `gc_hold_s` after its version was purged."""
    acme.push("pirate", FILES)
    work()
    tenant, digest = next(key for key in stored(store) if key[1] == digests(FILES)["adapter_model.safetensors"])
    pull = store.stream(tenant, digest)
    acme.call("DELETE", "/adapters/pirate")
    acme.call("POST", "/adapters/pirate/purge")
    pass_time(settings.gc_hold_s - 5)
    assert counts(collect()) == {}
    assert settings.gc_hold_s >= settings.grant_ttl_s + settings.grant_leeway_s
    assert store.size(tenant, digest) == len(FILES["adapter_model.safetensors"]), "who begins now still finds them"
    pass_time(10)
    assert counts(collect())["swept_blobs"] == 2
    assert b"".join(pull) == FILES["adapter_model.safetensors"], "who has begun reads to the end"


def test_it_keeps_to_its_rate(
    acme: Pusher, collector: GarbageCollection, pass_time: Pass, *, database: Database, settings: Settings
) -> None:
    acme.upload({str(number): bytes([number]) for number in range(6)})
    pass_time(settings.gc_grace_s + 1)
    start(database)
    began = time.monotonic()
    assert worker_of(replace(collector, settings=settings.model_copy(update={"gc_rate": 20.0}))).run_one()
    assert time.monotonic() - began >= 6 / 20


def _until_over(worker: Worker, database: Database) -> None:
    deadline = time.monotonic() + 30
    while True:
        with database.system_read() as session:
            if session.scalar(select(Job.id).where(Job.finished_at.is_(None))) is None:
                return
        assert time.monotonic() < deadline, "it never ended"
        worker.run_one()
        time.sleep(0.02)


@pytest.mark.postgresql
def test_what_a_dead_collector_had_taken_is_anybodys(
    acme: Pusher, collect: Collect, pass_time: Pass, *, store: BlobStore, database: Database, work: Work
) -> None:
    """It died before or after it had removed the bytes."""
    before, after = FILES.values()
    acme.upload(FILES)
    [(tenant, _), _other] = stored(store)
    with database.system_write() as session:
        session.execute(update(Blob).values(deleting_until=database_time(session) + dt.timedelta(seconds=60), deleting_by="x"))
    store.delete(tenant, hashlib.sha256(after).hexdigest())
    assert counts(collect()) == {}, "it may be at it still"
    for data in (before, after):
        digest = hashlib.sha256(data).hexdigest()
        assert {acme.call(method, f"/blobs/{digest}").status_code for method in ("GET", "HEAD")} == {404}, "such a row promises nothing"
        assert acme.call("PUT", f"/blobs/{digest}", content=data).status_code == 503
    pass_time(61)
    assert acme.push("pirate", FILES).status_code == 201, "who uploads them has them"
    work()
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"
    check_integrity(database, store, collected=True)


@pytest.mark.postgresql
def test_what_a_push_is_about_to_name_is_left_alone(
    acme: Pusher,
    collector: GarbageCollection,
    pass_time: Pass,
    in_background: Any,
    *,
    store: BlobStore,
    database: Database,
    settings: Settings,
) -> None:
    """Its transaction holds the blob, and nobody else sees its references yet."""
    digest = acme.upload({"f": b"12345"})["f"]
    pass_time(settings.gc_grace_s + 1)
    start(database)
    [(tenant, _)] = stored(store)
    with database.system_write() as session:
        blobs.hold(session, tenant, "a version".ljust(32), [digest])
        sweeping = in_background(worker_of(collector).run_one)
        wait([sweeping], timeout=1.5)  # on PostgreSQL it ends here, on SQLite it waits for us
    assert sweeping.result(30)
    assert stored(store) == {(tenant, digest)}
    assert acme.call("GET", f"/blobs/{digest}").content == b"12345"
