"""A registry with two tenants, a base model and ready adapters; served for real where a test needs sockets."""

from __future__ import annotations

import atexit
import datetime as dt
import hashlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import update
from starlette.testclient import TestClient

from registry.adapters.models import Adapter, AdapterVersion, Alias, Form
from registry.app import create_app
from registry.artifact.manifest import BlobRef, FileEntry, FormManifest, VersionManifest
from registry.base_models.models import BaseModelRevision
from registry.blobs.models import Blob
from registry.config import Settings
from registry.db import Database, Table, database_time
from registry.serving.grants import GrantSigner, signer_for
from registry.serving.models import Replica
from registry.tenants.keys import new_key
from registry.tenants.models import ApiKey, Tenant
from registry.wire import WIRE_VERSION

BASE_DIGEST = "b" * 64
SECRET = "0123456789abcdef" * 3
WEIGHTS = bytes(range(256)) * 40


@dataclass
class Pushed:
    """A ready adapter version, as the tests need it."""

    tenant_id: str
    adapter_id: str
    version_digest: str
    form_digest: str
    blobs: dict[str, bytes]

    @property
    def weights(self) -> str:
        return next(sha for sha, data in self.blobs.items() if data.endswith(WEIGHTS))


@dataclass
class World:
    """The database beside the application, to arrange and to break things."""

    app: FastAPI
    database: Database
    settings: Settings
    keys: dict[str, str] = field(default_factory=dict)
    tenants: dict[str, str] = field(default_factory=dict)

    @property
    def signer(self) -> GrantSigner:
        return signer_for(SECRET)

    def bearer(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    def add(self, *rows: Any) -> None:
        with self.database.write() as session:
            for row in rows:
                session.add(row)
                session.flush()

    def add_tenant(self, name: str) -> str:
        self.tenants[name] = hashlib.md5(name.encode()).hexdigest()
        self.add(Tenant(id=self.tenants[name], name=name))
        self.add_key(name, tenant=name, scopes=["inference", "adapters:read"])
        return self.tenants[name]

    def add_key(self, name: str, *, tenant: str | None, scopes: list[str]) -> str:
        made = new_key()
        digest = self.app.state.key_hasher.digest(made.token)
        tenant_id = self.tenants[tenant] if tenant else None
        self.add(ApiKey(id=made.key_id, tenant_id=tenant_id, name=name, token_hmac=digest, scopes=scopes))
        self.keys[name] = made.token
        return made.key_id

    def add_base_model(self, name: str = "tiny", digest: str = BASE_DIGEST, status: str = "ready") -> str:
        model_id = hashlib.md5(name.encode()).hexdigest()
        self.add(BaseModelRevision(id=model_id, name=name, status=status, base_digest=digest, source={}, upstream_names=[]))
        return model_id

    def push(
        self, tenant: str, name: str, *, number: int = 1, rank: int = 4, status: str = "ready", alias: str | None = "default"
    ) -> Pushed:
        """What a push and its validation leave behind, bytes included."""
        tenant_id, base_id = self.tenants[tenant], hashlib.md5(b"tiny").hexdigest()
        files = {
            "adapter_config.json": f"{tenant}/{name}/{number}".encode(),
            "adapter_model.safetensors": f"{name}{number}".encode() + WEIGHTS,
        }
        entries = {path: (hashlib.sha256(data).hexdigest(), data) for path, data in files.items()}
        manifest = VersionManifest(tuple(FileEntry(path, sha, len(data)) for path, (sha, data) in entries.items()))
        form = FormManifest(BASE_DIGEST, {path: BlobRef(sha, len(data)) for path, (sha, data) in entries.items()})
        adapter_id = hashlib.md5(f"{tenant}/{name}".encode()).hexdigest()
        version_id = hashlib.md5(f"{tenant}/{name}@{number}".encode()).hexdigest()
        for sha, data in entries.values():
            self._store(tenant_id, sha, data)
        if number == 1:
            self.add(Adapter(id=adapter_id, tenant_id=tenant_id, name=name, base_model_id=base_id))
        common = {"tenant_id": tenant_id, "size_bytes": 1}
        version = {"version_digest": manifest.digest, "manifest": manifest.to_json(), "rank": rank, "targets": ["q_proj"], "num_params": 1}
        owner = {"adapter_id": adapter_id, "number": number, "status": status, "base_model_id": base_id, "created_by": "t"}
        self.add(
            AdapterVersion(id=version_id, **common, **version, **owner),
            Form(version_id=version_id, kind="raw", form_digest=form.digest, manifest=form.to_json(), **common),
        )
        if alias is not None:
            row = Alias(tenant_id=tenant_id, adapter_id=adapter_id, name=alias, version_id=version_id, generation=1, updated_by="t")
            self.add(row)
        return Pushed(tenant_id, adapter_id, manifest.digest, form.digest, dict(entries.values()))

    def _store(self, tenant_id: str, sha256: str, data: bytes) -> None:
        upload = self.app.state.blob_store.begin(tenant_id, sha256, max_bytes=1 << 20)
        upload.write(data)
        upload.commit()
        self.add(Blob(tenant_id=tenant_id, sha256=sha256, size=len(data)))

    def age_heartbeats(self, seconds: float) -> None:
        """As if every replica had last been heard of so long ago."""
        with self.database.write() as session:
            session.execute(update(Replica).values(heartbeat_at=database_time(session) - dt.timedelta(seconds=seconds)))

    def execute(self, sql: str, **values: Any) -> None:
        from sqlalchemy import text

        with self.database.write() as session:
            session.execute(text(sql), values)


@pytest.fixture
def world(tmp_path: Path, database_urls: dict[str, Any]) -> Iterator[World]:
    made = make_world(tmp_path, **database_urls)
    yield made
    made.database.close()
    made.app.state.database.close()


def make_world(directory: Path, **overrides: Any) -> World:
    """Tenants acme and rival with a key each, keys named admin and replica, the base model tiny."""
    if "database_url" in overrides:
        return _populated(_world(directory, keys={}, tenants={}, **overrides))
    keys, tenants = _copy_template(directory)
    return _world(directory, keys=dict(keys), tenants=dict(tenants), **overrides)


def _world(directory: Path, *, keys: dict[str, str], tenants: dict[str, str], **overrides: Any) -> World:
    values = {"state_dir": directory, "secret_key": SECRET, "replica_wait_s": 0.0, "log_level": "ERROR"} | overrides
    settings = Settings(**values)
    app = create_app(settings)
    database = Database(settings.database_system_url) if settings.database_system_url else app.state.database
    return World(app=app, database=database, settings=settings, keys=keys, tenants=tenants)


def _copy_template(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    template, keys, tenants = _template()
    shutil.copy(template / "lorary.sqlite3", directory)
    return keys, tenants


@cache
def _template() -> tuple[Path, dict[str, str], dict[str, str]]:
    """Made once a process: tables and first rows cost more than most tests."""
    directory = Path(tempfile.mkdtemp(prefix="lorary-test-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    made = _world(directory, keys={}, tenants={})
    Table.metadata.create_all(made.database.engine)
    _populated(made)
    made.database.close()  # folds the write-ahead log into the one file that is copied
    return directory, made.keys, made.tenants


def _populated(made: World) -> World:
    made.add_tenant("acme")
    made.add_tenant("rival")
    made.add_key("admin", tenant=None, scopes=["admin"])
    made.add_key("replica", tenant=None, scopes=["replica"])
    made.add_base_model()
    return made


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with TestClient(world.app) as made:
        yield made


def registration(url: str = "http://127.0.0.1:9", **changes: Any) -> dict[str, Any]:
    values = {"wire_version": WIRE_VERSION, "url": url, "base_digest": BASE_DIGEST, "max_rank": 64, "num_pages": 100, "page_bytes": 4096}
    return values | changes


def heartbeat(sequence: int = 1, **changes: Any) -> dict[str, Any]:
    values = {
        "wire_version": WIRE_VERSION,
        "sequence": sequence,
        "state": "ready",
        "num_queued": 0,
        "num_running": 0,
        "num_free_pages": 50,
        "residents": [],
    }
    return values | changes


def resident(pushed: Pushed, tier: str = "pool") -> dict[str, str]:
    return {"tenant": pushed.tenant_id, "form_digest": pushed.form_digest, "tier": tier}


def make_replica(http: Any, world: World, *, url: str = "http://127.0.0.1:9", key: str = "replica", **report: Any) -> str:
    """Register and report once: a live replica. Returns its id."""
    welcome = http.post("/api/v1/replicas", json=registration(url), headers=world.bearer(key))
    assert welcome.status_code == 200, welcome.text
    replica_id: str = welcome.json()["replica_id"]
    reply = http.post(f"/api/v1/replicas/{replica_id}/heartbeat", json=heartbeat(**report), headers=world.bearer(key))
    assert reply.status_code == 200, reply.text
    return replica_id


@contextmanager
def serving(app: Any, *, port: int = 0) -> Iterator[str]:
    """An ASGI application on a loopback socket; yields its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


def closed_port_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def wait_for(condition: Any, *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Stage:
    """One server for many applications, one at a time: starting and stopping servers would cost more than the tests."""

    app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def stage() -> Iterator[tuple[Stage, httpx2.Client]]:
    made = Stage()
    with serving(made) as url, httpx2.Client(base_url=url, trust_env=False, timeout=20) as http:
        yield made, http


@pytest.fixture
def served(world: World, stage: tuple[Stage, httpx2.Client]) -> httpx2.Client:
    """A client of the registry over real sockets."""
    stage[0].app = world.app
    return stage[1]
