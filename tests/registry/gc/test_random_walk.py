"""Random pushes, uploads, deletes, restores, purges, collections and time: after each, nothing is lost, and in the end nothing is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from sqlalchemy import func, select

from registry.blobs.models import Blob
from registry.blobs.store import BlobStore
from registry.config import Settings
from registry.db import Database
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.gc.conftest import Collect, Pass, check_integrity, stored

Work = Callable[[], int]
NUM_STEPS = 40
STEPS = "push push upload delete delete_all restore restore_all purge work time collect".split()
CONTENTS = [adapter(seed).files for seed in range(5)]  # they share their config, and the two tenants share all of it
SEEDS = [pytest.param(seed, marks=() if seed == 0 else pytest.mark.full) for seed in range(40)]


@dataclass
class Walk:
    """One run of random steps."""

    rng: random.Random
    tenants: list[Pusher]
    work: Work
    collect: Collect
    pass_time: Pass
    settings: Settings
    statuses: dict[str, set[int]] = field(default_factory=dict)

    def step(self) -> None:
        name = self.rng.choice(
            ["push", "push", "upload", "delete", "delete_all", "restore", "restore_all", "purge", "work", "time", "collect"]
        )
        getattr(self, name)()
        return name

    def push(self) -> None:
        self._call("push", self.rng.choice(self.tenants).push(self._name(), self.rng.choice(CONTENTS)).status_code)

    def upload(self) -> None:
        self.rng.choice(self.tenants).upload({"stray": bytes([self.rng.randrange(4)])})

    def delete(self) -> None:
        self._on_version("delete", "DELETE", "")

    def delete_all(self) -> None:
        self._call("delete_all", self.rng.choice(self.tenants).call("DELETE", f"/adapters/{self._name()}").status_code)

    def restore(self) -> None:
        self._on_version("restore", "POST", "/restore")

    def restore_all(self) -> None:
        self._call("restore_all", self.rng.choice(self.tenants).call("POST", f"/adapters/{self._name()}/restore").status_code)

    def purge(self) -> None:
        self._on_version("purge", "POST", "/purge")

    def time(self) -> None:
        longest = self.settings.deleted_retention_s + self.settings.gc_grace_s
        self.pass_time(self.rng.choice([1.0, self.settings.gc_hold_s + 1, self.settings.gc_grace_s + 1, longest]))

    def _on_version(self, what: str, method: str, suffix: str) -> None:
        path = f"/adapters/{self._name()}/versions/{self.rng.randint(1, 4)}{suffix}"
        self._call(what, self.rng.choice(self.tenants).call(method, path).status_code)

    def _name(self) -> str:
        return self.rng.choice(["a", "b"])

    def _call(self, what: str, status: int) -> None:
        assert status in {200, 201, 204, 404, 409, 422}, f"{what} answered {status}"
        self.statuses.setdefault(what, set()).add(status)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_and_nothing_is_left(
    *,
    acme: Pusher,
    globex: Pusher,
    operator: Pusher,
    work: Work,
    collect: Collect,
    pass_time: Pass,
    store: BlobStore,
    database: Database,
    settings: Settings,
    seed: int,
) -> None:
    rng = random.Random(seed)
    walk = Walk(rng, [acme, globex], work, collect, pass_time, settings)
    for _ in range(NUM_STEPS):
        walk.step()
        check_integrity(database, store, collected=False)
    assert walk.statuses["push"] - {201, 200} == set(), "every push went through"
    work()
    pass_time(settings.gc_grace_s + 1)
    for _ in range(2):  # what is purged in the first goes in the second
        collect()
        pass_time(settings.gc_hold_s + 1)
    check_integrity(database, store, collected=True)
    for tenant in (acme, globex):
        for item in tenant.get("/adapters")["items"]:
            for version in tenant.get(f"/adapters/{item['name']}/versions")["items"]:
                for file in version["files"]:
                    got = tenant.call("GET", f"/adapters/{item['name']}/versions/{version['number']}/files/{file['path']}")
                    assert len(got.content) == file["size"]
    for name in ("acme", "globex"):
        operator.call("DELETE", f"/tenants/{name}")
        operator.call("POST", f"/tenants/{name}/purge")
    collect()
    pass_time(settings.gc_hold_s + 1)
    collect()
    assert stored(store) == set()
    with database.system_read() as session:
        assert session.scalar(select(func.count()).select_from(Blob)) == 0
