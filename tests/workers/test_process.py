"""Real worker processes that are killed, stopped and told to end in the middle of a job.

The middle is held open by a named pipe in the place of a blob: a worker that reads it waits for a writer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from registry.adapters.models import AliasMove, Form
from registry.audit.models import AuditEvent
from registry.config import Settings
from registry.db import Database, Table
from registry.jobs.models import Job
from tests.registry.adapters.pushing import Pusher, adapter
from tests.workers.processes import Start, worker_processes


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Start]:
    with worker_processes(settings, tmp_path) as start:
        yield start


class HeldBlob:
    """A blob's file, away while a pipe stands in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)

    def wait_for_reader(self) -> int:
        """The pipe's writing end, once a process reads it."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                time.sleep(0.02)
        raise AssertionError("no worker came to read the blob")

    def put_back(self) -> None:
        self.path.unlink()
        self.path.write_bytes(self.data)

    def kill_reader(self, reader: subprocess.Popen[bytes], *, pipe: int) -> None:
        """Dead before the pipe has no writer any more: a reader that lives takes its end for the end of the blob."""
        reader.kill()
        reader.wait()
        os.close(pipe)
        self.put_back()


@pytest.fixture
def held(acme: Pusher, settings: Settings) -> HeldBlob:
    """A pushed version whose weights keep its validation waiting."""
    pushed = acme.push("pirate", adapter()).json()
    weights = next(file["sha256"] for file in pushed["files"] if file["path"] == "adapter_model.safetensors")
    return HeldBlob(next(settings.blob_dir.glob(f"*/{weights}")))


def wait_until_ready(acme: Pusher) -> None:
    deadline = time.monotonic() + 30
    while acme.get("/adapters/pirate/versions/1")["status"] != "ready":
        assert time.monotonic() < deadline, acme.get("/adapters/pirate/versions/1")
        time.sleep(0.05)


def count(database: Database, table: type[Table]) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def validation(database: Database) -> Job:
    with database.read() as session:
        job = session.scalar(select(Job).where(Job.kind == "validate_version"))
        assert job is not None
        return job


def assert_published_once(database: Database) -> None:
    assert (count(database, Form), count(database, AliasMove)) == (1, 1)
    with database.read() as session:
        ready = session.scalars(select(AuditEvent).where(AuditEvent.action == "version.ready")).all()
    assert len(ready) == 1


def test_another_worker_finishes_the_job_of_a_killed_one(acme: Pusher, database: Database, *, held: HeldBlob, start: Start) -> None:
    victim = start()
    held.kill_reader(victim, pipe=held.wait_for_reader())
    assert acme.get("/adapters/pirate/versions/1")["status"] == "pending"
    assert validation(database).state == "running", "nobody knows yet"
    start()
    wait_until_ready(acme)
    job = validation(database)
    assert (job.state, job.attempt, job.fence) == ("succeeded", 2, 2)
    assert_published_once(database)


def test_a_stopped_worker_that_wakes_up_late_publishes_nothing(acme: Pusher, database: Database, *, held: HeldBlob, start: Start) -> None:
    """Paused for longer than its lease, as by a hypervisor; the pipe then gives it the right bytes, too late."""
    sleeper = start()
    pipe = held.wait_for_reader()
    sleeper.send_signal(signal.SIGSTOP)
    held.put_back()
    start()
    wait_until_ready(acme)
    sleeper.send_signal(signal.SIGCONT)
    os.set_blocking(pipe, True)
    with os.fdopen(pipe, "wb") as writer:
        writer.write(held.data)
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.wait(timeout=30) == 0
    job = validation(database)
    assert (job.state, job.fence, job.result) == ("succeeded", 2, {"outcome": "ready"})
    assert_published_once(database)


def test_sigterm_finishes_the_job_in_hand(acme: Pusher, database: Database, *, held: HeldBlob, start: Start) -> None:
    worker = start()
    pipe = held.wait_for_reader()
    acme.push("second", adapter(1))
    held.put_back()
    worker.send_signal(signal.SIGTERM)
    os.set_blocking(pipe, True)
    with os.fdopen(pipe, "wb") as writer:
        writer.write(held.data)
    assert worker.wait(timeout=30) == 0
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"
    assert acme.get("/adapters/second/versions/1")["status"] == "pending", "a draining worker takes no new job"


def test_sigterm_ends_an_idle_worker_at_once(start: Start, database: Database) -> None:
    worker = start()
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=30) == 0
    assert time.monotonic() - began < 5
