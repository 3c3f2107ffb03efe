"""Random work under random faults: processes are killed and paused, the broker, S3 and the database go away and come back.

Then everything is let recover, and nothing may be lost, doubled or stuck. `pytest tests/faults/test_crashes.py`
runs 200 seeds; a seed decides what is done and what is broken, the machine decides in which order they meet.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from registry.adapters.models import Adapter, AdapterVersion
from registry.blobs.models import Blob
from registry.blobs.service import open_blob_store
from registry.db import Database
from registry.gc import service as gc
from registry.jobs.models import Job
from registry.jobs.service import COLLECT_GARBAGE
from registry.tenants.auth import SYSTEM
from registry.tenants.models import ApiKey
from tests.faults.clients import Client, Promises
from tests.faults.integrity import check_integrity, settle
from tests.faults.plant import LEASE_S, Plant, until
from workers.collect import GarbageCollection
from workers.shell import JobKind, Worker

NUM_SEEDS = 200
IN_DEFAULT_SUITE = (0,)
WORKERS = ("worker-1", "worker-2")
SEEDS = [pytest.param(seed, marks=() if seed in IN_DEFAULT_SUITE else pytest.mark.full) for seed in range(NUM_SEEDS)]


@pytest.fixture
def running(plant: Plant) -> Plant:
    """With two workers and a relay."""
    for name in ("api", *WORKERS, "relay"):
        if name not in plant.processes:
            plant.start(name)
    until(plant.is_up, what="the registry did not come back")
    return plant


def kill(*names: str) -> Callable[[Plant, random.Random], None]:
    def act(plant: Plant, dice: random.Random) -> None:
        name = dice.choice(names)
        plant.kill(name)
        plant.start(name, wait=False)

    return act


def pause(*names: str) -> Callable[[Plant, random.Random], None]:
    """For longer than a lease: whoever wakes up finds its jobs done by another."""

    def act(plant: Plant, dice: random.Random) -> None:
        name = dice.choice(names)
        plant.signal(name, signal.SIGSTOP)
        time.sleep(dice.uniform(0.2, 1.5 * LEASE_S))
        plant.signal(name, signal.SIGCONT)

    return act


def lose_store(plant: Plant, dice: random.Random) -> None:
    plant.store_proxy.cut()
    time.sleep(dice.uniform(0.1, 0.8))
    plant.store_proxy.mend()


def lose_database(plant: Plant, dice: random.Random) -> None:
    plant.database_proxy.cut()
    time.sleep(dice.uniform(0.05, 0.5))
    plant.database_proxy.mend()


def lose_broker(plant: Plant, dice: random.Random) -> None:
    """With every hint in it: this Redis keeps nothing on disk."""
    plant.redis.kill()
    time.sleep(dice.uniform(0.1, 0.8))
    plant.redis.start()


FAULTS = [
    kill(*WORKERS),
    kill(*WORKERS),
    kill("api"),
    kill("relay"),
    pause(*WORKERS),
    pause("relay", "api"),
    lose_store,
    lose_database,
    lose_broker,
]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_doubled_or_stuck(seed: int, running: Plant) -> None:
    plant = running
    tenant = f"tenant-{seed}"
    tenant_id, token = plant.make_tenant(tenant)
    with plant.client(token) as client:
        hook = client.post("/webhooks", json={"url": f"{plant.ears.url}/{tenant_id}", "event_types": ["*"]})
        assert hook.status_code == 201, hook.text
    clients = [Client(plant, tenant=tenant, token=token, seed=f"{seed}/{number}") for number in range(3)]
    dice, over = random.Random(seed), threading.Event()
    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(client.act, 5, over) for client in clients]
        for fault in dice.sample(FAULTS, 3):
            time.sleep(dice.uniform(0.0, 0.4))
            fault(plant, dice)
        over.set()
        for work in working:
            work.result(240)
    settle(plant, tenant_id)
    check_integrity(plant, tenant_id)
    for client in clients:
        check_promises(plant, tenant_id, client.promises)
    check_quota(plant, tenant_id, token)


def check_promises(plant: Plant, tenant_id: str, promises: Promises) -> None:
    with plant.database.system_read() as session:
        versions = select(Adapter.name, AdapterVersion.number, AdapterVersion.version_digest).join(
            AdapterVersion, AdapterVersion.adapter_id == Adapter.id
        )
        assert promises.versions <= {tuple(row) for row in session.execute(versions.where(Adapter.tenant_id == tenant_id))}
        blobs = session.scalars(select(Blob.sha256).where(Blob.tenant_id == tenant_id)).all()
        assert promises.blobs | promises.uploads <= set(blobs)
        living = select(ApiKey.id).where(ApiKey.id.in_(promises.revoked), ApiKey.revoked_at.is_(None))
        assert session.scalars(living).all() == []


def check_quota(plant: Plant, tenant_id: str, token: str) -> None:
    """What the registry says is used is what there is."""
    with plant.database.system_read() as session:
        num_bytes = session.scalar(select(func.coalesce(func.sum(Blob.size), 0)).where(Blob.tenant_id == tenant_id))
        alive = select(func.count()).where(Adapter.tenant_id == tenant_id, Adapter.deleted_at.is_(None))
        num_adapters = session.scalar(alive)
    with plant.client(token) as client:
        quota = client.get("/quota").json()
    assert (quota["bytes"]["used"], quota["adapters"]["used"]) == (num_bytes, num_adapters)
    assert quota["bytes"]["reserved"] >= 0


def test_no_bytes_are_left_over(plant: Plant) -> None:
    """Of all the seeds that ran before: a collection without grace leaves what versions need, and nothing else."""
    plant.stop_workers()
    collect_garbage(plant)
    store = open_blob_store(plant.settings)
    with plant.database.system_read() as session:
        versions = session.scalars(select(AdapterVersion).where(AdapterVersion.purged_at.is_(None))).all()
        rows = {(blob.tenant_id, blob.sha256): blob.size for blob in session.scalars(select(Blob))}
    needed = {(version.tenant_id, file["sha256"]) for version in versions for file in version.manifest["files"]}
    assert needed == rows.keys()
    assert {(blob.tenant_id, blob.sha256): blob.size for blob in store.list()} == rows


def collect_garbage(plant: Plant) -> None:
    """In this process, with the roles of a worker."""
    database = Database(plant.settings.database_url, system_url=plant.settings.database_system_url)
    settings = plant.settings.model_copy(update={"gc_grace_s": 0.0, "gc_rate": 0.0, "gc_slice_s": 3600.0})
    collection = GarbageCollection(database, open_blob_store(settings), settings)
    worker = Worker(database, kinds={COLLECT_GARBAGE: JobKind(run=collection.run, give_up=collection.give_up)}, lease_s=30, poll_s=0.1)
    with database.system_write() as session:
        job_id = gc.start(session, SYSTEM, dry_run=False)[0].id

    def is_over() -> bool:
        worker.run_one()
        with database.system_read() as session:
            return session.get_one(Job, job_id).state == "succeeded"

    until(is_over, what="the collection did not end")
    database.close()
