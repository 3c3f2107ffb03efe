"""A registry with a ready base model `tiny`, two tenants and a worker that runs when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from registry.config import Settings
from registry.db import Database, open_database
from tests.generate import BASE_NAME
from tests.registry.adapters.pushing import Pusher, write_base_model
from tests.registry.conftest import MakeTenant, bearer
from workers.__main__ import build_worker
from workers.shell import Worker


@pytest.fixture
def worker(settings: Settings, database: Database) -> Iterator[Worker]:
    """With the roles that a worker has, not the tests'."""
    own = open_database(settings)
    yield build_worker(settings, own)
    own.close()


@pytest.fixture
def work(worker: Worker) -> Callable[[], int]:
    """Runs every job that is due; returns how many there were."""

    def run() -> int:
        count = 0
        while worker.run_one():
            count += 1
        return count

    return run


@pytest.fixture
def operator(client: TestClient, admin_token: str) -> Pusher:
    return Pusher(client, bearer(admin_token))


@pytest.fixture
def base_model(operator: Pusher, tmp_path: Path, work: Callable[[], int]) -> str:
    """The name of a ready base model."""
    folder = write_base_model(tmp_path / "tiny")
    source = {"kind": "directory", "location": str(folder)}
    response = operator.call("POST", "/base-models", json={"name": "tiny", "source": source, "upstream_names": [BASE_NAME]})
    assert response.status_code == 202, response.text
    assert work() == 1
    return "tiny"


@pytest.fixture
def acme(client: TestClient, make_tenant: MakeTenant, base_model: str) -> Pusher:
    return Pusher(client, bearer(make_tenant("acme")))


@pytest.fixture
def globex(client: TestClient, make_tenant: MakeTenant, base_model: str) -> Pusher:
    return Pusher(client, bearer(make_tenant("globex")))
