"""A registry per test: settings, database, application, client, keys. Real files, real HTTP stack, no doubles.

Every test that has a database runs on SQLite and on PostgreSQL, there with all three roles. On PostgreSQL only those
marked `postgresql` belong to `make test`, the others to `make test-full`; `sqlite` marks what is about SQLite.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from registry.app import create_app
from registry.audit.service import record
from registry.config import Settings
from registry.db import Database
from registry.models import metadata
from registry.tenants import service
from registry.tenants.auth import SYSTEM, Subject
from registry.tenants.keys import ADMIN, TENANT_SCOPES, KeyHasher

SECRET_KEY = "a-secret-key-for-tests-that-is-long-enough"

MakeTenant = Callable[..., str]
MakeKey = Callable[..., str]


def bearer(token: str, tenant: str | None = None) -> dict[str, str]:
    """Request headers of `token`; an admin key names `tenant`."""
    return {"Authorization": f"Bearer {token}"} | ({"X-Lorary-Tenant": tenant} if tenant else {})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database_kind" not in metafunc.fixturenames or hasattr(metafunc.module, "database_kind"):
        return  # a module that says so itself is about that database
    kinds: list[Any] = ["sqlite"]
    if metafunc.definition.get_closest_marker("sqlite") is None:
        both = metafunc.definition.get_closest_marker("postgresql") is not None
        kinds.append(pytest.param("postgresql", marks=() if both else pytest.mark.full))
    metafunc.parametrize("database_kind", kinds)


@pytest.fixture
def database_urls(database_kind: str, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Settings of the database: none for SQLite's file, the three roles' URLs for an installation on PostgreSQL."""
    if database_kind == "sqlite":
        yield {}
        return
    server = request.getfixturevalue("postgresql_server")
    with server.installation() as name:
        yield server.urls(name)


@pytest.fixture
def settings(tmp_path: Path, database_urls: dict[str, Any]) -> Settings:
    return Settings(state_dir=tmp_path / "state", secret_key=SecretStr(SECRET_KEY), database_busy_timeout_s=10.0, **database_urls)


@pytest.fixture(scope="session")
def database_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables made once, from the models; `tests/registry/migrations` says that migrations make the same."""
    path = tmp_path_factory.mktemp("template") / "lorary.sqlite3"
    database = Database(f"sqlite:///{path}")
    metadata.create_all(database.engine)
    database.close()
    return path


@pytest.fixture
def database(settings: Settings, database_template: Path) -> Iterator[Database]:
    """To arrange and to look at what the application did: across tenants. A file on SQLite, because threads share it."""
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    if not settings.database_url:
        shutil.copy(database_template, settings.state_dir / "lorary.sqlite3")
    url = settings.database_system_url or settings.resolved_database_url
    database = Database(url, busy_timeout_s=settings.database_busy_timeout_s)
    yield database
    database.close()


@pytest.fixture
def hasher() -> KeyHasher:
    return KeyHasher(SECRET_KEY)


@pytest.fixture
def app(settings: Settings, database: Database) -> Iterator[FastAPI]:
    made = create_app(settings)
    yield made
    made.state.database.close()


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """In-process; the lifespan runs. Errors become the responses that clients see."""
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def make_key(database: Database, hasher: KeyHasher) -> MakeKey:
    """make_key(scopes, tenant=None) -> token."""

    def make(*scopes: str, tenant: str | None = None) -> str:
        with database.write() as session:
            tenant_id = None if tenant is None else service.get_tenant(session, tenant).id
            _key, token = service.issue_key(
                session, subject=SYSTEM, tenant_id=tenant_id, name="test", scopes=scopes, expires_at=None, hasher=hasher, record=record
            )
        return token

    return make


@pytest.fixture
def make_tenant(database: Database, make_key: MakeKey) -> MakeTenant:
    """make_tenant(name, *scopes) -> token of a key in the new tenant, with every tenant scope unless some are named."""

    def make(name: str, *scopes: str) -> str:
        with database.write() as session:
            service.create_tenant(session, subject=SYSTEM, name=name, record=record)
        return make_key(*(scopes or sorted(TENANT_SCOPES)), tenant=name)

    return make


@pytest.fixture
def admin_token(make_key: MakeKey) -> str:
    return make_key(ADMIN)


@pytest.fixture
def replica_token(make_key: MakeKey) -> str:
    return make_key("replica")


@pytest.fixture
def subject_of(database: Database, hasher: KeyHasher) -> Callable[[str], Subject]:
    """The subject behind a token, for tests that call services directly."""
    from registry.tenants.auth import authenticate

    def subject(token: str) -> Subject:
        with database.read() as session:
            return authenticate(session, token, hasher)

    return subject


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """`app` under a real uvicorn on a loopback port; yields its base URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def server_url(app: FastAPI) -> Iterator[str]:
    """Real HTTP, for streaming, disconnects and the openai client."""
    with serve(app) as url:
        yield url
