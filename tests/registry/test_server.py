"""`python -m registry` as real processes: several workers behind one socket, one that dies, signals, a parent that dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from registry.config import Settings
from registry.db import Database
from registry.jobs import service as jobs
from tests.registry.conftest import SECRET_KEY, MakeKey, bearer
from tests.servers import free_ports

pytestmark = pytest.mark.sqlite
NUM_WORKERS = 2


class Api:
    """One `python -m registry` and what is below it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, *, metrics_port: int) -> None:
        self.process = process
        self.url = url
        self.metrics_port = metrics_port

    def workers(self) -> list[psutil.Process]:
        """Children that serve: multiprocessing has one more, which tracks resources."""
        return [child for child in psutil.Process(self.process.pid).children() if serves(child)]

    def exports(self, worker: int) -> bool:
        """A worker exports as soon as it serves."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.metrics_port + worker), timeout=5):
            return True
        return False

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/livez", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False


def serves(child: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(child.cmdline())
    except psutil.Error:  # it has just died
        return False


def eventually(holds: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def _free_neighbours() -> int:
    """A port that is free, as is the next."""
    while True:
        port = free_ports(1)[0]
        with suppress(OSError, OverflowError), socket.socket() as neighbour:
            neighbour.bind(("127.0.0.1", port + 1))
            return port


@contextmanager
def running(settings: Settings) -> Iterator[Api]:
    port, metrics_port = free_ports(1)[0], _free_neighbours()
    given = {"STATE_DIR": settings.state_dir, "SECRET_KEY": SECRET_KEY, "PORT": port}
    given |= {"API_WORKERS": NUM_WORKERS, "METRICS_PORT": metrics_port}
    environment = os.environ | {f"LORARY_{name}": str(value) for name, value in given.items()}
    process = subprocess.Popen([sys.executable, "-m", "registry"], env=environment, start_new_session=True)
    api = Api(process, f"http://127.0.0.1:{port}", metrics_port=metrics_port)
    try:
        eventually(lambda: api.answers() and len(api.workers()) == NUM_WORKERS and all(map(api.exports, range(NUM_WORKERS))))
        yield api
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def api(settings: Settings, database: Database) -> Iterator[Api]:
    with running(settings) as api:
        yield api


def test_a_worker_that_dies_is_replaced_and_sigterm_ends_all_with_their_streams(api: Api, database: Database, make_key: MakeKey) -> None:
    first = {worker.pid for worker in api.workers()}
    assert len(first) == NUM_WORKERS
    pages = [httpx2.get(f"http://127.0.0.1:{api.metrics_port + number}/metrics").text for number in range(NUM_WORKERS)]
    assert all("lorary_" in page for page in pages), "each worker exports on a port of its own"
    api.workers()[0].kill()
    eventually(lambda: len(api.workers()) == NUM_WORKERS and {worker.pid for worker in api.workers()} != first)
    eventually(api.answers)

    with database.write() as session:
        job_id = jobs.enqueue(session, kind=jobs.VALIDATE_VERSION, tenant_id=None, subject_id="test", payload={}).id
    headers = bearer(make_key("admin")) | {"Accept": "text/event-stream"}
    with httpx2.stream("GET", f"{api.url}/api/v1/jobs/{job_id}/events", headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("retry:")
        workers = api.workers()
        api.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert list(lines)[-1:] == [""], "ended in the middle of an event"
        assert time.monotonic() - started < 20, "the stream held the drain up"
    assert api.process.wait(timeout=60) == 0
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.full
def test_workers_end_with_a_parent_that_is_killed(api: Api) -> None:
    workers = api.workers()
    api.process.kill()
    eventually(lambda: not any(worker.is_running() for worker in workers))


def test_wrong_settings_end_the_parent_before_it_has_workers(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORARY_")}
    environment |= {"LORARY_STATE_DIR": str(tmp_path), "LORARY_API_WORKERS": str(NUM_WORKERS)}
    done = subprocess.run([sys.executable, "-m", "registry"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "lorary db init" in done.stderr
