"""The database goes away and comes back: new requests are told to come again, running ones finish, nothing must be restarted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from registry.app import create_app
from registry.config import Settings
from tests.postgresql import PostgreSQL
from tests.registry.conftest import SECRET_KEY
from tests.registry.serving.conftest import Stage, World, make_replica, make_world, serving, wait_for
from tests.registry.serving.fake_replica import EVENTS, FakeReplica


@contextmanager
def away(server: PostgreSQL, database: str) -> Iterator[None]:
    server.refuse_connections(database)
    try:
        yield
    finally:
        server.accept_connections(database)


@pytest.fixture
def world(postgresql_server: PostgreSQL, installation: str, tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path, **postgresql_server.urls(installation))
    made.push("acme", "pirate")
    yield made
    made.database.close()
    made.app.state.database.close()


def test_requests_get_503_and_then_are_served_again(world: World, postgresql_server: PostgreSQL, installation: str) -> None:
    key = world.bearer("acme")
    with TestClient(world.app, raise_server_exceptions=False) as client:
        assert client.get("/api/v1/adapters", headers=key).status_code == 200
        with away(postgresql_server, installation):
            for method, path in [("GET", "/api/v1/adapters"), ("PATCH", "/api/v1/adapters/pirate"), ("GET", "/v1/models")]:
                refused = client.request(method, path, headers=key, json={"description": "x"} if method == "PATCH" else None)
                assert refused.status_code == 503, refused.text
                assert int(refused.headers["Retry-After"]) > 0
                assert "lorary_app-secret" not in refused.text
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 503
        assert client.get("/readyz").status_code == 200
        assert [row["name"] for row in client.get("/api/v1/adapters", headers=key).json()["items"]] == ["pirate"]


def test_a_running_stream_finishes_while_the_database_is_away(world: World, postgresql_server: PostgreSQL, installation: str) -> None:
    replica, stage = FakeReplica(), Stage()
    stage.app = world.app
    with serving(replica) as replica.url, serving(stage) as url, httpx2.Client(base_url=url, trust_env=False, timeout=20) as http:
        make_replica(http, world, url=replica.url)
        asked = {"model": "pirate", "behave": "stream"}
        with http.stream("POST", "/v1/completions", json=asked, headers=world.bearer("acme")) as answer:
            parts = answer.iter_raw()
            received = next(parts)
            with away(postgresql_server, installation):
                refused = http.post("/v1/completions", json={"model": "pirate"}, headers=world.bearer("acme"))
                assert refused.status_code == 503
                assert refused.headers["Retry-After"]
                assert refused.json()["error"]["message"]
                replica.go.set()
                received += b"".join(parts)
        assert received == b"".join(EVENTS)
        assert http.post("/v1/completions", json={"model": "pirate"}, headers=world.bearer("acme")).status_code == 200


def test_a_lock_that_is_not_given_is_a_503_not_a_hang(
    world: World, postgresql_server: PostgreSQL, installation: str, tmp_path: Path
) -> None:
    urls = postgresql_server.urls(installation)
    world.add_key("writer", tenant="acme", scopes=["adapters:write"])
    writer = world.bearer("writer")
    hasty = Settings(state_dir=tmp_path, secret_key=world.settings.secret_key, database_lock_timeout_s=0.2, **urls)
    with TestClient(create_app(hasty), raise_server_exceptions=False) as client, postgresql_server.connect(installation) as other:
        other.execute("SELECT 1 FROM adapters FOR UPDATE")
        refused = client.delete("/api/v1/adapters/pirate", headers=writer)
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        other.rollback()
        assert client.delete("/api/v1/adapters/pirate", headers=writer).status_code == 204


def test_a_worker_waits_for_the_database(world: World, postgresql_server: PostgreSQL, installation: str, tmp_path: Path) -> None:
    from registry.db import open_database
    from registry.jobs import service as jobs
    from registry.jobs.models import Job
    from workers.__main__ import build_worker

    settings = Settings(state_dir=tmp_path, secret_key=SECRET_KEY, job_poll_s=0.02, **postgresql_server.urls(installation))
    own, stop = open_database(settings), threading.Event()
    thread = threading.Thread(target=build_worker(settings, own).run, args=(stop,))
    with away(postgresql_server, installation):
        thread.start()
        stop.wait(0.3)
        assert thread.is_alive()
    with world.database.write() as session:
        # of a version that is gone: an end without a result, but an end
        job_id = jobs.enqueue(
            session, kind=jobs.VALIDATE_VERSION, tenant_id=world.tenants["acme"], subject_id="k", payload={"version_id": "gone"}
        ).id

    def ended() -> bool:
        with world.database.read() as session:
            return session.get_one(Job, job_id).state == "succeeded"

    wait_for(ended, timeout_s=20)
    stop.set()
    thread.join(timeout=10)
    own.close()
