"""Policies over whole traces in virtual time: what dynamic mode gains, and that nobody is passed over beyond the bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_runtime.config import POLICIES
from gpu_runtime.scheduling.mode import policy
from gpu_runtime.scheduling.planner import Rules
from tests.bench.replay_world import DloraMachine, World, longest_over
from tests.bench.workload import Arrival, DloraTrace, SloraTrace


def replay(arrivals: list[Arrival], name: str, *, max_wait_s: float = 2.0, max_adapters: int = 0) -> World:
    world = World(arrivals, DloraMachine(), Rules(name, max_wait_s, max_adapters), num_places=4, step_tokens=32).run()
    world.scheduler.check_integrity()
    assert all(one.ended_s is not None for one in world.times.values())
    return world


def test_every_policy_of_the_configuration_exists() -> None:
    for name in POLICIES:
        assert policy(name)


def test_one_adapter_is_served_merged_and_none_in_base_mode() -> None:
    alone = [Arrival(0.0, 0, 8, 20) for _ in range(40)]
    assert replay(alone, "dynamic").tokens_per_s > 1.4 * replay(alone, "fcfs-unmerged").tokens_per_s
    base = [Arrival(0.1 * at, -1, 8, 20) for at in range(40)]
    assert replay(base, "dynamic").planner.num_switches == 0


def test_dynamic_is_no_worse_than_either_mode() -> None:
    for trace in (SloraTrace(5, 1.0, rate=8, duration_s=10, lengths=(8, 40)), SloraTrace(2, 0.1, rate=8, duration_s=10, lengths=(8, 40))):
        rates = {name: replay(trace.arrivals(), name, max_wait_s=5.0).tokens_per_s for name in POLICIES}
        assert rates["dynamic"] >= 0.97 * max(rates.values()), f"{trace}: {rates}"


arrivals_of_anybody = st.lists(
    st.builds(Arrival, at_s=st.floats(0, 6), adapter=st.integers(-1, 3), num_prompt=st.integers(1, 40), num_output=st.integers(1, 30)),
    min_size=1,
    max_size=60,
).map(lambda made: sorted(made, key=lambda one: one.at_s))


@settings(max_examples=40, deadline=None)
@given(arrivals=arrivals_of_anybody, max_wait_s=st.sampled_from([0.5, 1.0, 3.0]))
def test_nobody_waits_longer_than_first_come_first_served_and_the_bound(arrivals: list[Arrival], max_wait_s: float) -> None:
    fcfs = replay(arrivals, "fcfs-unmerged")
    assert longest_over(replay(arrivals, "dynamic", max_wait_s=max_wait_s), fcfs) <= max_wait_s


@pytest.mark.parametrize("max_wait_s", [0.5, 2.0])
def test_a_flood_of_one_adapter_starves_nobody(max_wait_s: float) -> None:
    """The adversary keeps one adapter's queue full, so that merging it always pays, and a victim comes now and then."""
    flood = [Arrival(0.02 * at, 0, 4, 12) for at in range(500)]
    victims = [Arrival(0.3 + 1.1 * at, 1 + at % 3, 20, 10) for at in range(8)]
    arrivals = sorted(flood + victims, key=lambda one: one.at_s)
    dynamic, fcfs = (replay(arrivals, name, max_wait_s=max_wait_s) for name in ("dynamic", "fcfs-unmerged"))
    assert longest_over(dynamic, fcfs) <= max_wait_s
    assert dynamic.tokens_per_s >= fcfs.tokens_per_s * (1.1 if max_wait_s >= 2.0 else 1.0)


def test_clustering_keeps_to_its_adapters_and_starves_nobody() -> None:
    arrivals = [Arrival(0.05 * at, at % 5, 6, 10) for at in range(60)]
    clustered = replay(arrivals, "fcfs-unmerged", max_wait_s=1.0, max_adapters=2)
    assert clustered.most_adapters <= 2
    assert longest_over(clustered, replay(arrivals, "fcfs-unmerged")) < clustered.now_s


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(POLICIES))
def test_bursts_are_served_to_the_end_in_every_mode(seed: int, name: str) -> None:
    replay(DloraTrace(8, rate=4, duration_s=6, lengths=(1, 40), seed=seed).arrivals(), name)
