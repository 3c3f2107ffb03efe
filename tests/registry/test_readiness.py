"""Readiness by really taking parts away; draining of a real process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from starlette.testclient import TestClient

import migrations
from registry.app import create_app
from registry.config import Settings
from registry.db import Database
from registry.readiness import Finding, Remembered, check_broker
from tests.brokers import RedisServer, free_port, own_redis
from tests.registry.conftest import SECRET_KEY

__all__ = ["own_redis"]

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.sqlite


@pytest.fixture
def migrated(settings: Settings) -> Settings:
    settings.state_dir.mkdir(parents=True)
    migrations.upgrade(settings.resolved_database_url)
    return settings


def until(holds: Callable[[], bool], *, what: str, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_schema_of_a_later_release_is_usable_and_one_of_an_earlier_is_not(migrated: Settings) -> None:
    """While an upgrade rolls out, the migration has run and this program still serves."""
    database = Database(migrated.resolved_database_url)
    with TestClient(create_app(migrated)) as client:
        for revision, status, code in (("later", "degraded", 200), ("0001", "unavailable", 503), (migrations.head_revision(), "ok", 200)):
            with database.write() as session:
                session.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
            answer = client.get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (code, status), answer.text
    database.close()


def test_a_broker_that_is_away_degrades_and_names_itself(migrated: Settings, own_redis: RedisServer) -> None:
    url = f"redis://:a-password@127.0.0.1:{own_redis.port}/0"
    assert "does not answer" in check_broker(url).said
    own_redis.start()
    assert check_broker(url) == Finding()
    own_redis.kill()
    with TestClient(create_app(migrated.model_copy(update={"broker_url": SecretStr(url)}))) as client:
        answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert "polling" in answer.json()["checks"]["broker"]
    assert "a-password" not in answer.text


def test_a_good_finding_is_remembered_and_a_bad_one_hardly() -> None:
    asked: list[Finding] = []
    away = threading.Event()

    def check() -> Finding:
        asked.append(Finding("away", usable=False) if away.is_set() else Finding())
        return asked[-1]

    remembered = Remembered(check, good_for_s=3600)
    assert [remembered() for _ in range(3)] == [Finding()] * 3
    assert len(asked) == 1
    short = Remembered(check, good_for_s=0)
    away.set()
    assert short().said == "away"
    away.clear()
    until(lambda: short() == Finding(), what="a part that came back stayed away", within_s=5)


def test_livez_needs_no_thread(migrated: Settings) -> None:
    """Requests that wait for a database may hold every thread of the pool; the process is alive all the same."""
    app, release = create_app(migrated), threading.Event()

    @app.get("/held")
    def held() -> None:
        release.wait(30)

    with TestClient(app) as client:
        threads = [threading.Thread(target=client.get, args=("/held",)) for _ in range(41)]
        for thread in threads:
            thread.start()
        try:
            assert client.get("/livez").json() == {"status": "ok"}
        finally:
            release.set()
            for thread in threads:
                thread.join()


def test_sigterm_is_not_ready_first_and_takes_requests_until_the_delay_is_over(migrated: Settings, tmp_path: Path) -> None:
    port, metrics_port = free_port(), free_port()
    environment = os.environ | {
        "LORARY_STATE_DIR": str(migrated.state_dir),
        "LORARY_SECRET_KEY": SECRET_KEY,
        "LORARY_PORT": str(port),
        "LORARY_METRICS_PORT": str(metrics_port),
        "LORARY_DRAIN_DELAY_S": "3600",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "registry"], cwd=ROOT, env=environment, stderr=log)
    url, metrics_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
    try:
        with httpx2.Client(trust_env=False, timeout=20) as client:

            def answers(code: int) -> bool:
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    return client.get(f"{url}/readyz").status_code == code
                except httpx2.TransportError:
                    return False

            until(lambda: answers(200), what="never ready")
            assert 'lorary_ready{part="admitting"} 1.0' in client.get(metrics_url).text
            assert client.get(f"{url}/metrics").status_code == 404, "the API's port gives no metrics"
            process.send_signal(signal.SIGTERM)
            until(lambda: answers(503), what="still ready after SIGTERM")
            assert "shutting down" in client.get(f"{url}/readyz").json()["checks"]["admitting"]
            assert client.get(f"{url}/livez").status_code == 200
            assert client.get(f"{url}/api/v1/whoami").status_code == 401, "requests are still answered"
            text_of = client.get(metrics_url).text
            assert 'lorary_ready{part="admitting"} 0.0' in text_of
            assert 'lorary_ready{part="database"} 1.0' in text_of
        process.send_signal(signal.SIGTERM)  # skips the rest of the delay
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_database_that_is_gone_and_back(migrated: Settings, tmp_path: Path) -> None:
    path, kept = migrated.state_dir / "lorary.sqlite3", tmp_path / "kept"
    with TestClient(create_app(migrated)) as client:
        assert client.get("/readyz").json()["status"] == "ok"
        client.app.state.database.close()  # type: ignore[attr-defined] - a fresh connection, as another pod would make
        shutil.move(path, kept)
        path.mkdir()
        gone = client.get("/readyz")
        assert gone.status_code == 503
        assert "does not answer" in gone.json()["checks"]["database"]
        path.rmdir()
        shutil.move(kept, path)
        assert client.get("/readyz").status_code == 200
