"""A process is killed at one chosen statement or request of its work. Another one takes over, and all is done once.

The table of every fault and the test that holds it is in README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from registry.jobs.models import Job
from tests.faults.integrity import check_integrity, settle
from tests.faults.plant import Plant
from tests.registry.adapters.pushing import adapter, sha256

_numbers = count(1)
CLAIM = (b"lease_owner=", b"COMMIT")


@dataclass(frozen=True)
class Tenant:
    """One tenant of a test, with a webhook that hears everything. Outages are errors here."""

    plant: Plant
    name: str
    id: str
    token: str
    http: httpx2.Client

    def call(self, method: str, path: str, **options: Any) -> Any:
        response = self.http.request(method, path, **options)
        assert response.status_code < 300, response.text
        return response.json() if response.content else None

    def upload(self, files: dict[str, bytes]) -> dict[str, str]:
        for data in files.values():
            self.call("PUT", f"/blobs/{sha256(data)}", content=data)
        return {path: sha256(data) for path, data in files.items()}

    def push(self, name: str, seed: int = 0) -> Any:
        return self.call("POST", f"/adapters/{name}/versions", json={"files": self.upload(dict(adapter(seed).files))})


@pytest.fixture
def quiet(plant: Plant) -> Plant:
    """Nobody works but the registry."""
    plant.stop_workers()
    if "api" not in plant.processes:
        plant.start("api")
    return plant


@contextmanager
def making_tenant(plant: Plant) -> Iterator[Tenant]:
    name = f"killed-{next(_numbers)}"
    tenant_id, token = plant.make_tenant(name)
    with plant.client(token) as http:
        made = Tenant(plant, name, tenant_id, token, http)
        made.call("POST", "/webhooks", json={"url": f"{plant.ears.url}/{tenant_id}", "event_types": ["*"]})
        yield made


@pytest.fixture
def tenant(quiet: Plant) -> Iterator[Tenant]:
    with making_tenant(quiet) as made:
        yield made


def job_of(plant: Plant, kind: str, tenant_id: str | None) -> Job:
    with plant.database.system_read() as session:
        return session.scalars(select(Job).where(Job.kind == kind, Job.tenant_id == tenant_id).order_by(Job.created_at.desc())).all()[0]


def kill_worker_at(plant: Plant, *needles: bytes, where: str, answered: bool) -> None:
    """A worker starts, comes to that point and dies there; then another one starts."""
    proxy = plant.store_proxy if where == "store" else plant.database_proxy
    hold = proxy.hold_at(*needles, answered=answered)
    plant.start("victim", wait=False)
    hold.wait()
    plant.kill("victim")
    proxy.let_go()
    plant.start("heir")


def kill_api_at(plant: Plant, *needles: bytes, answered: bool, act: Callable[[], Any]) -> None:
    """`act` asks the registry for something, and its process dies there."""
    hold = plant.database_proxy.hold_at(*needles, answered=answered)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(act)
        hold.wait()
        plant.kill("api")
        plant.database_proxy.let_go()
        with pytest.raises(httpx2.TransportError):
            asked.result(30)
    plant.start("api")


POINTS = {
    # what a worker is about to say, to whom; or has said, and the answer never came
    "claimed": (CLAIM, "database", True),
    "reading": ((b"Range: bytes=",), "store", False),
    "publishing": ((b"INSERT INTO forms",), "database", False),
    "committing": ((b"INSERT INTO forms", b"COMMIT"), "database", False),
    "committed": ((b"INSERT INTO forms", b"COMMIT"), "database", True),
}
FULL = pytest.mark.full


@pytest.mark.parametrize("point", [pytest.param(point, marks=() if point == "committing" else FULL) for point in POINTS])
def test_validation(point: str, quiet: Plant, tenant: Tenant) -> None:
    needles, where, answered = POINTS[point]
    tenant.push("pirate")
    kill_worker_at(quiet, *needles, where=where, answered=answered)
    settle(quiet, tenant.id)
    check_integrity(quiet, tenant.id)
    assert tenant.call("GET", "/adapters/pirate/versions/1")["status"] == "ready"
    attempts = 1 if point == "committed" else 2
    job = job_of(quiet, "validate_version", tenant.id)
    assert (job.state, job.attempt, job.fence) == ("succeeded", attempts, attempts)


@pytest.mark.full
@pytest.mark.parametrize(
    ("needles", "where", "answered"),
    [
        (CLAIM, "database", True),
        ((b"POST /",), "store", False),
        ((b"POST /",), "store", True),
        ((b"Range: bytes=",), "store", False),
        ((b"x-amz-copy-source",), "store", False),
        ((b"x-amz-copy-source",), "store", True),
        ((b"UPDATE uploads",), "database", False),
        ((b"UPDATE uploads", b"COMMIT"), "database", False),
    ],
    ids=["claimed", "joining", "joined", "hashing", "placing", "placed", "publishing", "committing"],
)
def test_finalising(needles: tuple[bytes, ...], where: str, answered: bool, *, quiet: Plant, tenant: Tenant) -> None:
    data = bytes(range(256)) * 2000 + tenant.id.encode()
    begun = tenant.call("POST", "/uploads", json={"sha256": sha256(data), "size": len(data)})
    tenant.call("PUT", f"/uploads/{begun['id']}/parts/1", content=data)
    tenant.call("POST", f"/uploads/{begun['id']}/complete")
    kill_worker_at(quiet, *needles, where=where, answered=answered)
    settle(quiet, tenant.id)
    check_integrity(quiet, tenant.id)
    assert tenant.call("GET", f"/uploads/{begun['id']}")["state"] == "done"
    assert job_of(quiet, "finalise_upload", tenant.id).attempt == 2
    assert tenant.http.get(f"/blobs/{sha256(data)}").content == data


@pytest.mark.full
@pytest.mark.parametrize(
    ("needles", "where", "answered"),
    [
        (CLAIM, "database", True),
        ((b"PUT /",), "store", False),
        ((b"PUT /",), "store", True),
        ((b"INSERT INTO blobs",), "database", False),
        ((b"INSERT INTO adapter_versions",), "database", False),
        ((b"INSERT INTO adapter_versions", b"COMMIT"), "database", False),
        ((b"INSERT INTO adapter_versions", b"COMMIT"), "database", True),
    ],
    ids=["claimed", "storing", "stored", "recording", "publishing", "committing", "committed"],
)
def test_import_from_a_hub(needles: tuple[bytes, ...], where: str, answered: bool, *, quiet: Plant, tenant: Tenant) -> None:
    with making_tenant(quiet) as source:
        source.push("original")
        quiet.start("first")
        settle(quiet, source.id)
        quiet.kill("first")
        tenant.call("PUT", "/secrets/theirs", json={"value": source.token})
        wanted = {"repo": f"{source.name}/original", "name": "copy", "endpoint": quiet.url, "token_secret": "theirs"}
        tenant.call("POST", "/imports", json=wanted)
        kill_worker_at(quiet, *needles, where=where, answered=answered)
        settle(quiet, tenant.id)
    check_integrity(quiet, tenant.id)
    num_attempts = 1 if answered and needles[0] == b"INSERT INTO adapter_versions" else 2
    assert job_of(quiet, "import_hub", tenant.id).attempt == num_attempts
    versions = tenant.call("GET", "/adapters/copy/versions")["items"]
    assert [(version["number"], version["status"]) for version in versions] == [(1, "ready")]


@pytest.mark.full
@pytest.mark.parametrize(
    "needles", [CLAIM, (b"UPDATE base_models",), (b"UPDATE base_models", b"COMMIT")], ids=["claimed", "publishing", "committing"]
)
def test_import_of_a_base_model(needles: tuple[bytes, ...], quiet: Plant) -> None:
    name = f"base-{next(_numbers)}"
    quiet.register_base_model(name)
    kill_worker_at(quiet, *needles, where="database", answered=needles is CLAIM)
    quiet.await_base_model(name)
    job = job_of(quiet, "import_base_model", None)
    assert (job.state, job.attempt) == ("succeeded", 2)


@pytest.mark.full
@pytest.mark.parametrize("phase", ["between bytes and row", "between blob and version", "before the answer"])
def test_the_registry_is_killed_in_a_push(phase: str, quiet: Plant, tenant: Tenant) -> None:
    """What was not answered is asked again, and is there once."""
    needles: dict[str, tuple[bytes, ...]] = {
        "between bytes and row": (b"INSERT INTO blobs",),
        "between blob and version": (b"INSERT INTO adapter_versions",),
        "before the answer": (b"INSERT INTO adapter_versions", b"COMMIT"),
    }
    kill_api_at(quiet, *needles[phase], answered=phase == "before the answer", act=lambda: tenant.push("pirate"))
    pushed = tenant.push("pirate")
    assert pushed["number"] == 1
    quiet.start("heir")
    settle(quiet, tenant.id)
    check_integrity(quiet, tenant.id)
    assert tenant.call("GET", "/adapters/pirate/versions/1")["status"] == "ready"


@pytest.mark.full
def test_a_relay_is_killed_between_publishing_and_deleting(quiet: Plant, tenant: Tenant) -> None:
    """The hint comes twice; its job is done once."""
    hold = quiet.database_proxy.hold_at(b"DELETE FROM job_outbox")
    quiet.start("relay")
    tenant.push("pirate")
    hold.wait()
    quiet.kill("relay")
    quiet.database_proxy.let_go()
    quiet.start("heir")
    settle(quiet, tenant.id)
    check_integrity(quiet, tenant.id)
    job = job_of(quiet, "validate_version", tenant.id)
    assert (job.state, job.attempt) == ("succeeded", 1)


@pytest.mark.full
def test_a_delivery_is_sent_and_its_worker_killed_before_it_is_marked(quiet: Plant, tenant: Tenant) -> None:
    """It is sent again, under the same id."""
    tenant.push("pirate")
    kill_worker_at(quiet, b"delivered", where="database", answered=False)
    settle(quiet, tenant.id)
    check_integrity(quiet, tenant.id)
    assert max(quiet.ears.heard[f"/{tenant.id}"].values()) == 2


SKEWED = """
import os, time
_true = time.time
time.time = lambda: _true() + float(os.environ["CLOCK_AHEAD_S"])
"""


@pytest.mark.full
def test_a_worker_whose_clock_is_wrong(quiet: Plant, tenant: Tenant, tmp_path: Path) -> None:
    """One is an hour ahead, one an hour behind: leases are the database's, so nobody takes another's job or leaves one lying."""
    (tmp_path / "sitecustomize.py").write_text(SKEWED)
    for name, ahead_s in (("ahead", "3600"), ("behind", "-3600")):
        quiet.start(name, PYTHONPATH=str(tmp_path), CLOCK_AHEAD_S=ahead_s)
    for seed in range(6):
        tenant.push("pirate", seed)
    settle(quiet, tenant.id)
    check_integrity(quiet, tenant.id)
    with quiet.database.system_read() as session:
        jobs = session.scalars(select(Job).where(Job.tenant_id == tenant.id)).all()
    assert {(job.state, job.attempt) for job in jobs} == {("succeeded", 1)}
