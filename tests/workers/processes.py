"""Real worker processes over a test's state directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.config import Settings

ROOT = Path(__file__).resolve().parents[2]
LEASE_S = 1.5

Start = Callable[..., subprocess.Popen[bytes]]


@contextmanager
def worker_processes(settings: Settings, logs: Path) -> Iterator[Start]:
    """start(module="workers", waits_for=..., **environment) -> a process that has begun; what still runs at the end is killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(module: str = "workers", *, waits_for: str = "worker.started", **variables: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "LORARY_STATE_DIR": str(settings.state_dir),
            "LORARY_DATABASE_URL": settings.database_url,
            "LORARY_DATABASE_SYSTEM_URL": settings.database_system_url,
            "LORARY_BROKER_URL": settings.broker_url.get_secret_value(),
            "LORARY_JOB_LEASE_S": str(LEASE_S),
            "LORARY_JOB_POLL_S": "0.05",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        log = logs / f"worker-{len(processes)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env=environment, stderr=stderr)
        processes.append(process)
        deadline = time.monotonic() + 60
        while waits_for.encode() not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{module} did not start"
            time.sleep(0.02)
        return process

    try:
        yield start
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def ended(process: subprocess.Popen[bytes], *, within_s: float = 30.0) -> int:
    return process.wait(timeout=within_s)
