"""Jobs over a real Redis, with real worker processes: hints come twice, late or never, and every job is done once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select

from registry.config import Settings
from registry.db import Database
from registry.jobs import service as jobs
from registry.jobs.models import Job, OutboxMessage
from tests.brokers import RedisServer, own_redis, redis_server
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import SECRET_KEY
from tests.workers.processes import Start, ended, worker_processes

__all__ = ["own_redis", "redis_server"]

NO_POLL = {"LORARY_BROKER_POLL_S": "3600"}
_numbers = itertools.count(1)


@pytest.fixture
def broker_url(redis_server: RedisServer) -> str:
    return redis_server.url(next(_numbers))


@pytest.fixture
def settings(tmp_path: Path, broker_url: str) -> Settings:
    return Settings(
        state_dir=tmp_path / "state", secret_key=SecretStr(SECRET_KEY), broker_url=SecretStr(broker_url), database_busy_timeout_s=10.0
    )


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Start]:
    with worker_processes(settings, tmp_path) as start:
        yield start


def until(holds: Callable[[], bool], *, what: str, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def num_waiting(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(OutboxMessage)) or 0


def validation(database: Database) -> Job:
    with database.read() as session:
        return session.scalars(select(Job).where(Job.kind == jobs.VALIDATE_VERSION)).one()


def test_a_push_is_validated_by_way_of_the_broker(acme: Pusher, database: Database, start: Start) -> None:
    """Nobody polls: the outbox, the relay, Redis and the task did it."""
    worker = start(**NO_POLL)
    time.sleep(1)  # its first look at the table is over
    assert acme.push("pirate", adapter()).status_code == 201
    until(lambda: validation(database).state == "succeeded", what="the hint did not arrive")
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"
    assert validation(database).attempt == 1
    until(lambda: num_waiting(database) == 0, what="a published hint stays in the outbox")
    worker.terminate()
    assert ended(worker) == 0
