"""One real registry on loopback with a worker beside it, and the `lorary` command called as its console script calls it."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from registry.app import create_app
from registry.bootstrap import init_database
from registry.cli.main import main
from registry.config import Settings
from registry.db import Database
from registry.tenants.keys import TENANT_SCOPES
from tests.generate import BASE_NAME
from tests.registry.conftest import serve
from tests.tiny import make_tiny_model
from workers.__main__ import build_worker

_numbers = itertools.count()


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


class Lorary:
    """The command, as one person with one state directory and one key uses it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state_dir: Path, *, url: str, key: str | None) -> None:
        self.state_dir, self.url = state_dir, url
        self._monkeypatch = monkeypatch
        self.environment = {"LORARY_STATE_DIR": str(state_dir), "LORARY_URL": url, "LORARY_API_KEY": key or "", "LORARY_TENANT": ""}

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> Done:
        """`lorary(*arguments)`: exit code and both streams."""
        out, err = io.StringIO(), io.StringIO()
        with self._monkeypatch.context() as patch:
            for name, value in (self.environment | environment).items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = _exit_code(arguments)
        return Done(code, out.getvalue(), err.getvalue())

    def ok(self, *arguments: str, **options: str) -> Any:
        """The JSON of a command that must succeed."""
        done = self(*arguments, "-o", "json", **options)
        assert done.code == 0, done.stderr
        return done.json()


def _exit_code(arguments: tuple[str, ...]) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` sets logging up for its process, which here is everybody's."""
    for name in ("LORARY_URL", "LORARY_API_KEY", "LORARY_TENANT", "LORARY_STATE_DIR", "LORARY_PORT"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@dataclass(frozen=True)
class Registry:
    """A running registry and its first admin key."""

    url: str
    settings: Settings
    admin_key: str


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    made = init_database(Settings(state_dir=tmp_path_factory.mktemp("registry"), job_poll_s=0.05, database_busy_timeout_s=15.0))
    assert made.admin_token is not None
    stop, database = threading.Event(), Database(made.settings.resolved_database_url)
    worker = threading.Thread(target=build_worker(made.settings, database).run, args=(stop,), daemon=True)
    worker.start()
    with serve(create_app(made.settings)) as url:
        yield Registry(url, made.settings, made.admin_token)
    stop.set()
    worker.join(timeout=20)
    database.close()
    assert not worker.is_alive(), "the worker did not stop"


@pytest.fixture
def admin(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lorary:
    return Lorary(monkeypatch, tmp_path / "admin", url=registry.url, key=registry.admin_key)


@pytest.fixture
def base_model(admin: Lorary, tiny_model_dir: Path) -> str:
    """The name of a ready base model, which generated adapters name as theirs."""
    model = admin.ok("base-models", "add", "tiny", str(tiny_model_dir), "--upstream-name", BASE_NAME)
    assert model["status"] == "ready"
    return "tiny"


@pytest.fixture
def tenant(admin: Lorary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lorary:
    """The command of somebody in a tenant of the test's own."""
    name = f"tenant-{next(_numbers)}"
    admin.ok("tenants", "create", name)
    scopes = [part for scope in sorted(TENANT_SCOPES) for part in ("--scope", scope)]
    key = admin.ok("keys", "create", "test", *scopes, "--tenant", name)["token"]
    return Lorary(monkeypatch, tmp_path / "tenant", url=admin.url, key=key)
