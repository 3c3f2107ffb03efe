"""Step times are learnt from what is observed, whatever the machine does now and then."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_runtime.core import AdapterKey
from gpu_runtime.scheduling.cost import CostTable, LearntCost, Work

TRUTH = CostTable(step_s=20e-3, request_s=5e-4, token_s=1e-3, lora_s=3e-3, adapter_s=1e-3, rank_s=2e-5, switch_s=0.12)


def some_work(draw: random.Random) -> Work:
    requests = draw.randint(1, 16)
    adapters = draw.randint(0, requests) if draw.random() < 0.7 else 0
    return Work(
        requests, requests + draw.choice([0, 0, 0, draw.randint(1, 400)]), adapters, sum(draw.choice([8, 16, 64]) for _ in range(adapters))
    )


def taught(seed: int, *, steps: int = 400, disturbance: float = 0.0, truth: CostTable = TRUTH) -> LearntCost:
    draw, cost = random.Random(seed), LearntCost()
    for _ in range(steps):
        work = some_work(draw)
        took_s = truth.predict(work) * draw.uniform(0.97, 1.03)
        cost.observe(work, took_s=took_s * 20 if draw.random() < disturbance else took_s)
    return cost


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_step_is_predicted_within_a_tenth(seed: int) -> None:
    cost, draw = taught(seed), random.Random(seed + 1)
    for _ in range(50):
        work = some_work(draw)
        assert cost.predict(work) == pytest.approx(TRUTH.predict(work), rel=0.1)
    assert min(cost.table.coefficients()) >= 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_steps_that_something_else_disturbed_count_for_little(seed: int) -> None:
    cost = taught(seed, disturbance=0.03)
    full = Work(16, 16, 16, 256)
    assert cost.predict(full) == pytest.approx(TRUTH.predict(full), rel=0.35)


def test_a_machine_that_changes_is_followed() -> None:
    cost = taught(0)
    slower = CostTable(*(3 * TRUTH.coefficients()).tolist(), switch_s=0.3)
    draw = random.Random(1)
    for _ in range(1200):
        work = some_work(draw)
        cost.observe(work, took_s=slower.predict(work))
    assert cost.predict(Work(8, 8)) == pytest.approx(slower.predict(Work(8, 8)), rel=0.1)


def test_steps_that_are_all_alike_or_take_no_time_are_borne() -> None:
    cost = LearntCost()
    for _ in range(20_000):
        cost.observe(Work(1, 1), took_s=0.02)
    assert cost.predict(Work(1, 1)) == pytest.approx(0.02, rel=0.01)
    for _ in range(300):
        cost.observe(Work(2, 3, 2, 24), took_s=0.0)
    assert cost.predict(Work(2, 3, 2, 24)) < 0.005


def test_a_change_of_mode_is_measured_too() -> None:
    cost = LearntCost()
    for _ in range(30):
        cost.observe_switch(0.2)
    assert cost.switch_s == pytest.approx(0.2, rel=0.01)


def test_an_adapter_counts_once_and_not_in_merged_mode() -> None:
    a, b = AdapterKey("t", "a"), AdapterKey("t", "b")
    rows = [(1, a, 8), (5, a, 8), (1, b, 16), (2, None, 0)]
    assert Work.of(rows, merged=False) == Work(4, 9, 2, 24)
    assert Work.of(rows, merged=True) == Work(4, 9)
