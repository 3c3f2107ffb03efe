"""Jobs over a real Redis, and RabbitMQ where it is installed: hints come twice, late or never, and every job is done once."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span
from pydantic import SecretStr
from sqlalchemy import func, select, text

from registry.config import Settings
from registry.db import Database
from registry.jobs import outbox
from registry.jobs import service as jobs
from registry.jobs.models import Job, OutboxMessage
from tests.brokers import Broker, broker, free_port, own_broker
from tests.otlp import collecting
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import SECRET_KEY
from tests.workers.processes import Start, ended, worker_processes
from tests.workers.test_process import HeldBlob, assert_published_once
from workers.app import make_publisher
from workers.outbox import BrokerAway, Relay

__all__ = ["broker", "own_broker"]

pytestmark = pytest.mark.sqlite
NO_POLL = {"LORARY_BROKER_POLL_S": "3600"}
_numbers = itertools.count(1)


@pytest.fixture
def broker_url(broker: Broker) -> str:
    return broker.url(next(_numbers))


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
    """Nobody polls: the outbox, the relay, the broker and the task did it."""
    worker = start(**NO_POLL)
    time.sleep(1)  # its first look at the table is over
    assert acme.push("pirate", adapter()).status_code == 201
    until(lambda: validation(database).state == "succeeded", what="the hint did not arrive")
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"
    assert validation(database).attempt == 1
    until(lambda: num_waiting(database) == 0, what="a published hint stays in the outbox")
    worker.terminate()
    assert ended(worker, within_s=8) == 0, "an idle consumer wakes to end"


def test_a_hint_that_comes_five_times_is_one_run(acme: Pusher, database: Database, *, settings: Settings, start: Start) -> None:
    """Delivered to two workers at once, five times each before and after the job is done."""
    publish = make_publisher(settings)
    acme.push("pirate", adapter())
    job = validation(database)
    hints = [outbox.Hint(f"copy-{number}", job.id, "cpu", 5, fence=1) for number in range(10)]
    for hint in hints[:5]:
        publish(hint)
    for _ in range(2):
        start(**NO_POLL)
    until(lambda: validation(database).state == "succeeded", what="no hint did it")
    for hint in hints[5:]:
        publish(hint)
    until(lambda: num_waiting(database) == 0, what="the outbox is not empty")
    time.sleep(1)
    after = validation(database)
    assert (after.state, after.attempt, after.fence) == ("succeeded", 1, 1)
    assert [event["state"] for event in acme.get(f"/jobs/{job.id}/events")["items"]] == ["queued", "running", "succeeded"]


class Killed(BaseException):
    """The relay's process ends here."""


def test_a_relay_killed_between_publishing_and_deleting_is_harmless(database: Database, acme: Pusher, settings: Settings) -> None:
    """Another relay publishes the hint again once the dead one's hold is over."""
    published: list[str] = []

    def publish_and_die(hint: outbox.Hint) -> None:
        published.append(hint.job_id)
        raise Killed

    acme.push("pirate", adapter())
    waiting = num_waiting(database)
    with pytest.raises(Killed):
        Relay(database, publish_and_die, hold_s=0.3).relay()
    assert (len(published), num_waiting(database)) == (1, waiting), "still there"
    other = Relay(database, lambda hint: published.append(hint.job_id))
    assert other.relay() == 0, "held by the dead one"
    time.sleep(0.4)
    assert other.relay() == waiting
    assert num_waiting(database) == 0
    assert published.count(published[0]) == 2


def test_two_relays_at_once_publish_each_hint_once(database: Database, settings: Settings, acme: Pusher) -> None:
    dispatching = Database(settings.resolved_database_url, busy_timeout_s=20, dispatch=True)
    with dispatching.write() as session:
        for _ in range(150):
            jobs.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={})
    due = num_waiting(database)
    published: list[str] = []
    relays = [Relay(dispatching, lambda hint: published.append(hint.id)) for _ in range(3)]

    def drain(relay: Relay) -> None:
        while relay.relay():
            pass

    threads = [threading.Thread(target=drain, args=(relay,)) for relay in relays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    dispatching.close()
    assert len(published) == len(set(published)) == due
    assert num_waiting(database) == 0


def test_a_late_relay_does_not_delete_what_another_holds(database: Database, acme: Pusher) -> None:
    """Stalled for longer than its hold: its fence is old."""
    with database.write() as session:
        stale = outbox.take(session, limit=1, hold_s=-1)[0]
    with database.write() as session:
        assert stale.id in {hint.id for hint in outbox.take(session, limit=10, hold_s=60)}
    with database.write() as session:
        outbox.settle(session, stale)
        outbox.put_back(session, stale, retry_in_s=0)
    assert num_waiting(database) > 0
    with database.read() as session:
        assert not outbox.is_anything_due(session)


def test_a_broker_that_is_away_keeps_hints_in_the_outbox(database: Database, acme: Pusher, own_broker: Broker) -> None:
    """Away at the push, back later: nothing is lost, and the request did not wait."""
    settings = Settings(broker_url=SecretStr(own_broker.url()))
    relay = Relay(database, make_publisher(settings))
    acme.push("pirate", adapter())
    waiting = num_waiting(database)
    with pytest.raises(BrokerAway):
        relay.relay()
    assert num_waiting(database) == waiting
    own_broker.start()
    assert relay.relay() == waiting
    assert num_waiting(database) == 0


def test_workers_poll_while_the_broker_is_away(acme: Pusher, database: Database, *, own_broker: Broker, start: Start) -> None:
    """And come back to it: a worker that was connected, lost the broker, and has it again."""
    own_broker.start()
    worker = start(LORARY_BROKER_URL=own_broker.url(), LORARY_BROKER_POLL_S="0.3")
    own_broker.kill()
    acme.push("pirate", adapter())
    until(lambda: acme.get("/adapters/pirate/versions/1")["status"] == "ready", what="nobody polled")
    own_broker.start()
    acme.push("second", adapter(1))
    until(lambda: acme.get("/adapters/second/versions/1")["status"] == "ready", what="nobody came back")
    until(lambda: num_waiting(database) == 0, what="the relay did not come back")
    worker.terminate()
    assert ended(worker) == 0


@pytest.mark.parametrize(
    "phase", [pytest.param("hash_config", marks=pytest.mark.full), pytest.param("hash_weights", marks=pytest.mark.full), "publish"]
)
def test_a_worker_killed_in_any_phase_is_replaced(
    phase: str, acme: Pusher, database: Database, *, settings: Settings, start: Start
) -> None:
    """Found by the sweeper of another worker once the lease is over; what was half done is nowhere to be seen."""
    pushed = acme.push("pirate", adapter()).json()
    name = "adapter_config.json" if phase == "hash_config" else "adapter_model.safetensors"
    sha256 = next(file["sha256"] for file in pushed["files"] if file["path"] == name)
    held = HeldBlob(next(settings.blob_dir.glob(f"*/{sha256}")))
    victim = start()
    pipe = held.wait_for_reader()
    if phase == "publish":
        kill_while_it_waits_to_publish(database, pipe=pipe, held=held, victim=victim)
    else:
        held.kill_reader(victim, pipe=pipe)
    assert acme.get("/adapters/pirate/versions/1")["status"] == "pending"
    start(LORARY_BROKER_POLL_S="0.3")
    until(lambda: acme.get("/adapters/pirate/versions/1")["status"] == "ready", what="nobody took over")
    job = validation(database)
    assert (job.state, job.attempt, job.fence) == ("succeeded", 2, 2)
    assert_published_once(database)


def kill_while_it_waits_to_publish(database: Database, *, pipe: int, held: HeldBlob, victim: subprocess.Popen[bytes]) -> None:
    """We hold SQLite's one writer while it has everything but the transaction in which it publishes."""
    held.put_back()
    with database.write() as session:
        session.execute(text("SELECT 1"))
        os.set_blocking(pipe, True)
        with os.fdopen(pipe, "wb") as writer:
            writer.write(held.data)
        time.sleep(0.7)  # to read the rest and come to its own transaction
        victim.kill()
        victim.wait()


def test_sigterm_while_the_broker_is_away_ends_the_worker(start: Start, database: Database) -> None:
    worker = start(LORARY_BROKER_URL="redis://127.0.0.1:1/0")
    time.sleep(0.5)
    worker.terminate()
    assert ended(worker) == 0


def test_without_a_broker_nothing_is_written_for_one(database: Database) -> None:
    with database.write() as session:
        jobs.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={})
    assert num_waiting(database) == 0


@pytest.mark.parametrize("url", ["http://broker", "sqs://x", "redis"])
def test_other_brokers_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="redis:// or an amqp://"):
        make_publisher(Settings(broker_url=SecretStr(url)))


def test_a_hint_carries_the_trace_of_the_request(acme: Pusher, database: Database, start: Start) -> None:
    """Request -> published hint -> job: each span is the next one's parent, across three programs and Redis."""
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    caller = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    with collecting() as collector:
        start(**NO_POLL, **collector.environment, LORARY_METRICS_PORT=str(port := free_port()))
        polled = 'lorary_worker_claims_total{found_by="poll",result="none"} 1.0'  # from now on only a hint finds a job
        until(lambda: polled in httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text, what="the first poll")
        with use_span(NonRecordingSpan(caller)):
            assert acme.push("pirate", adapter()).status_code == 201
        job = collector.wait_for(lambda one: one.name == "job validate_version")
        published = collector.wait_for(lambda one: one.name == "job.publish")
    assert {job.trace_id, published.trace_id} == {trace_id}
    assert (published.parent_id, job.parent_id) == (span_id, published.span_id)
    assert job.attributes["lorary.job.outcome"] == "finished"
