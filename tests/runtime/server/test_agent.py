"""The agent against the real registry, and against ones that are away, forgetful or of another version."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gpu_runtime.core import AdapterKey
from gpu_runtime.engine.state import EngineState, ResidentAdapter
from gpu_runtime.server import agent as agent_module
from gpu_runtime.server.agent import ReplicaAgent
from gpu_runtime.server.grants import GrantVerifier
from gpu_runtime.server.usage import UsageBuffer
from registry.wire import GRANT_HEADER
from tests.registry.serving.conftest import BASE_DIGEST, Pushed, World, closed_port_url, make_world, serving, wait_for
from tests.registry.serving.fake_replica import fake_replica

READY = EngineState(
    condition="ready", num_queued=0, num_running=0, num_pages=100, num_free_pages=90, page_bytes=4096, max_rank=64, num_slots=8
)


@dataclass
class Engine:
    """What the agent sees of an engine: a state that tests set, and drops that tests complete."""

    current: EngineState = READY
    dropped: list[AdapterKey] = field(default_factory=list)
    drops: list[Future[None]] = field(default_factory=list)
    broken: bool = False

    def state(self) -> EngineState:
        if self.broken:
            raise RuntimeError("a fault of the engine")
        return self.current

    def drop(self, key: AdapterKey) -> Future[None]:
        self.dropped.append(key)
        self.drops.append(Future())
        return self.drops[-1]

    def holds(self, *pushed: Pushed, tier: Any = "pool") -> None:
        residents = tuple(ResidentAdapter(AdapterKey(one.tenant_id, one.form_digest), tier) for one in pushed)
        self.current = replace(self.current, residents=residents)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path, heartbeat_interval_s=0.02)
    yield made
    made.database.close()


@dataclass
class Running:
    agent: ReplicaAgent
    engine: Engine
    verifier: GrantVerifier
    http: httpx2.Client

    def row(self, world: World) -> dict[str, Any]:
        rows = self.http.get("/api/v1/replicas", headers=world.bearer("admin")).json()["items"]
        return rows[0] if rows else {}


def make_agent(world: World, url: str, *, replica_url: str = "http://127.0.0.1:9", **options: Any) -> ReplicaAgent:
    values = {"engine": Engine(), "key": world.keys["replica"], "base_digest": BASE_DIGEST, "verifier": GrantVerifier()}
    values |= {"usage": UsageBuffer(), "backoff_s": 0.02}
    return ReplicaAgent(**(values | {"registry_url": url, "url": replica_url} | options))


@pytest.fixture
def running(world: World) -> Iterator[Running]:
    engine, verifier = Engine(), GrantVerifier()
    with serving(world.app) as url, httpx2.Client(base_url=url, trust_env=False) as http:
        agent = make_agent(world, url, engine=engine, verifier=verifier)
        agent.start()
        wait_for(lambda: agent.replica_id)
        yield Running(agent, engine, verifier, http)
        agent.stop()


def test_it_registers_reports_and_is_chosen(world: World, running: Running) -> None:
    pushed = world.push("acme", "pirate")
    running.engine.holds(pushed)
    running.engine.current = replace(running.engine.current, num_queued=3, num_running=2, num_free_pages=77)
    wait_for(lambda: running.row(world).get("num_queued") == 3)
    row = running.row(world)
    assert (row["live"], row["state"], row["num_running"], row["num_free_pages"], row["num_residents"]) == (True, "ready", 2, 77, 1)
    assert (row["id"], row["max_rank"], row["num_pages"], row["page_bytes"]) == (running.agent.replica_id, 64, 100, 4096)
    assert running.agent.last_error is None


def test_a_request_through_the_front_door_carries_a_grant_that_the_verifier_takes(world: World) -> None:
    verifier = GrantVerifier()
    with fake_replica() as replica, serving(world.app) as url, httpx2.Client(base_url=url, trust_env=False) as http:
        agent = make_agent(world, url, replica_url=replica.url, verifier=verifier)
        agent.start()
        wait_for(lambda: agent.replica_id)
        wait_for(lambda: http.post("/v1/completions", json={"model": "tiny"}, headers=world.bearer("acme")).status_code == 200)
        assert verifier.verify(replica.requests[-1][1][GRANT_HEADER.lower()]).model == "tiny"
        agent.stop()


def test_what_is_deleted_is_dropped_once_at_a_time_until_it_is_gone(world: World, running: Running) -> None:
    kept, gone = world.push("acme", "kept"), world.push("acme", "gone")
    key = AdapterKey(gone.tenant_id, gone.form_digest)
    running.engine.holds(kept, gone)
    wait_for(lambda: running.row(world).get("num_residents") == 2)
    assert running.engine.dropped == []
    world.execute("UPDATE adapters SET deleted_at = '2026-01-01 00:00:00.000000' WHERE name = 'gone'")
    wait_for(lambda: running.engine.dropped)
    time.sleep(0.2)
    assert running.engine.dropped == [key], "said again with every heartbeat, but not done yet"
    running.engine.drops[0].set_result(None)
    wait_for(lambda: len(running.engine.dropped) == 2)
    running.engine.holds(kept)
    wait_for(lambda: running.row(world).get("num_residents") == 1)


def test_a_registry_that_forgot_it_hears_from_it_again(world: World, running: Running) -> None:
    first = running.agent.replica_id
    world.execute("DELETE FROM replicas")
    wait_for(lambda: running.agent.replica_id not in (None, first))
    wait_for(lambda: running.row(world).get("live"))


def test_draining_is_said_at_once_and_goodbye_too(world: World, running: Running) -> None:
    wait_for(lambda: running.row(world).get("live"))
    running.agent.drain()
    wait_for(lambda: running.row(world)["state"] == "draining")
    assert running.row(world)["live"] is False
    running.agent.stop()
    running.agent.stop()


def test_stopping_without_a_drain_says_goodbye(world: World, running: Running) -> None:
    wait_for(lambda: running.row(world).get("live"))
    running.agent.stop()
    assert running.row(world)["state"] == "draining"


@pytest.mark.parametrize("condition", ["draining", "stopped", "failed", "starting"])
def test_an_engine_that_is_not_ready_is_reported_draining(world: World, running: Running, condition: Any) -> None:
    running.engine.current = replace(READY, condition=condition)
    wait_for(lambda: running.row(world).get("state") == "draining")


def test_new_grant_keys_arrive_with_a_heartbeat(world: World, running: Running) -> None:
    running.verifier.update(public_keys=[])
    wait_for(lambda: running.verifier._keys)


def test_a_registry_that_comes_late_or_goes_away_is_survived(world: World) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = make_agent(world, f"http://127.0.0.1:{port}")
    agent.start()
    wait_for(lambda: agent.last_error)
    assert agent.replica_id is None
    for _ in range(2):
        with serving(world.app, port=port):
            wait_for(lambda: agent.replica_id is not None and agent.last_error is None)
        wait_for(lambda: agent.last_error)
        assert agent.replica_id is not None, "an outage does not make it forget who it is"
        assert agent._thread.is_alive()
        world = reopened(world)
    agent.stop()


def reopened(world: World) -> World:
    """The application's lifespan closes what it holds, so a restarted registry is a new application on the same state."""
    from registry.app import create_app

    app = create_app(world.settings)
    return replace(world, app=app, database=app.state.database)


def test_a_fault_of_the_engine_does_not_end_the_agent(world: World, running: Running) -> None:
    running.engine.broken = True
    wait_for(lambda: "a fault of the engine" in (running.agent.last_error or ""))
    running.engine.broken = False
    wait_for(lambda: running.agent.last_error is None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_digest": "c" * 64}, "no ready base model has the digest"),
        ({"key": "lry_nonsense"}, "401"),
        ({"replica_url": "http://h:1/path"}, "url"),
    ],
)
def test_what_only_an_operator_can_mend_is_named_and_tried_again(world: World, options: dict[str, Any], said: str) -> None:
    with serving(world.app) as url:
        agent = make_agent(world, url, **options)
        agent.start()
        wait_for(lambda: said in (agent.last_error or ""))
        assert agent._thread.is_alive()
        agent.stop()


def test_another_wire_version_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(world.app) as url:
        monkeypatch.setattr(agent_module.ReplicaRegistration.model_fields["wire_version"], "default", 99)
        agent_module.ReplicaRegistration.model_rebuild(force=True)
        agent = make_agent(world, url)
        agent.start()
        wait_for(lambda: agent.last_error)
        agent.stop()
    monkeypatch.undo()
    agent_module.ReplicaRegistration.model_rebuild(force=True)
    assert "wire_version is 99" in (agent.last_error or "")


def test_stopping_is_quick_when_nobody_is_there(world: World) -> None:
    agent = make_agent(world, closed_port_url(), backoff_s=30.0)
    agent.start()
    wait_for(lambda: agent.last_error)
    started = time.monotonic()
    agent.stop()
    assert time.monotonic() - started < 3
    make_agent(world, closed_port_url()).stop()


def test_more_residents_than_a_heartbeat_holds_are_cut_from_the_far_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "MAX_RESIDENTS", 2)
    tiers = ("disk", "pool", "host")
    residents = tuple(ResidentAdapter(AdapterKey("t", str(index) * 64), tier) for index, tier in enumerate(tiers))  # type: ignore[arg-type]
    heartbeat = make_agent(world, "http://h")._heartbeat(replace(READY, residents=residents))
    assert [one.tier for one in heartbeat.residents] == ["pool", "host"]
