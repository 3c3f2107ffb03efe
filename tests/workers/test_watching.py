"""A worker process as Prometheus and a kubelet see it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from registry.config import Settings
from tests.brokers import free_port
from tests.registry.adapters.pushing import Pusher, adapter
from tests.workers.processes import Start, ended, worker_processes

pytestmark = pytest.mark.sqlite


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Start]:
    with worker_processes(settings, tmp_path) as start:
        yield start


def until(holds: Callable[[], bool], *, what: str, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_worker_tells_what_it_did_and_what_it_lacks(acme: Pusher, settings: Settings, start: Start, tmp_path: Path) -> None:
    """The test's database is made from the models, without Alembic's table: a schema that no program could trust."""
    port = free_port()
    process = start(LORARY_METRICS_PORT=str(port))
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        assert client.get("/livez").status_code == 200
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["database"]) == (503, "ok")
        assert "lorary db upgrade" in ready.json()["checks"]["schema"]
        acme.push("pirate", adapter())
        done = 'lorary_worker_jobs_total{kind="validate_version",outcome="finished"} 1.0'
        until(lambda: done in client.get("/metrics").text, what="the job is not counted")
        text = client.get("/metrics").text
        assert 'lorary_gate_outcomes_total{code="ready",stage="job"} 1.0' in text
        assert 'lorary_ready{part="schema"} 0.0' in text
        settings.blob_dir.rename(tmp_path / "kept")
        settings.blob_dir.write_text("a file where the folder was")
        until(lambda: client.get("/readyz").json()["checks"]["blob_store"] != "ok", what="the lost store is not noticed")
        assert client.get("/livez").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 0
