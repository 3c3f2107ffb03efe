"""The eviction cost: what it weighs, what it remembers, and that it loads fewer bytes than LRU where some adapters are popular."""

from __future__ import annotations

import pytest

from gpu_runtime.adapters.eviction import HALF_LIFE_USES, IdleAdapter, ReuseHistory, cheapest_to_lose
from gpu_runtime.core import AdapterKey
from tests.bench.eviction import least_recently_used, replay
from tests.bench.workload import SloraTrace

A, B, C = (AdapterKey("t", name * 64) for name in "abc")


def test_the_wanted_stay_then_the_likely_then_the_recent() -> None:
    wanted = IdleAdapter(A, 2, last_used=1, wanted=True, chance=0.0)
    likely = IdleAdapter(B, 2, last_used=2, wanted=False, chance=3.0)
    rare = IdleAdapter(C, 2, last_used=3, wanted=False, chance=1.0)
    assert cheapest_to_lose([wanted, likely, rare]) is rare
    assert cheapest_to_lose([wanted, likely]) is likely
    older = IdleAdapter(A, 9, last_used=1, wanted=False, chance=1.0)
    assert cheapest_to_lose([rare, older]) is older


def test_what_must_be_pulled_again_costs_more_than_what_lies_on_the_host() -> None:
    away = IdleAdapter(A, 2, last_used=1, wanted=False, chance=1.0, on_host=False)
    here = IdleAdapter(B, 2, last_used=2, wanted=False, chance=3.0)
    assert cheapest_to_lose([away, here]) is here


def test_a_count_halves_with_the_uses_of_others_and_outlives_an_eviction() -> None:
    history = ReuseHistory()
    for _ in range(4):
        history.used(A)
    before = history.chance(A)
    for _ in range(HALF_LIFE_USES):
        history.used(B)
    assert history.chance(A) == pytest.approx(before / 2)
    assert history.chance(C) == 0
    history.forget(A)
    assert history.chance(A) == 0


def test_the_memory_is_bounded_and_keeps_the_likely() -> None:
    history = ReuseHistory(max_remembered=10)
    for _ in range(3):
        history.used(A)
    for number in range(100):
        history.used(AdapterKey("t", str(number)))
    assert len(history._counts) <= 10
    assert history.chance(A) > 2


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6])
def test_fewer_bytes_are_loaded_than_by_lru_on_the_skewed_trace(alpha: float) -> None:
    trace = SloraTrace(num_adapters=200, alpha=alpha, rate=20, duration_s=60)
    ours, lru = (replay(trace, victim=policy, pool_pages=600).num_pages for policy in (cheapest_to_lose, least_recently_used))
    assert ours <= lru


def test_the_trace_is_s_loras_number_for_number() -> None:
    """Its rule under seed 42; alpha 1 is uniform, 0.1 gives adapter 0 about 59 % of 200 (its paper's own figure)."""
    uniform = SloraTrace(num_adapters=200, duration_s=2000).arrivals()
    assert abs(sum(arrival.adapter < 100 for arrival in uniform) / len(uniform) - 0.5) < 0.02
    skewed = SloraTrace(num_adapters=200, alpha=0.1, duration_s=2000).arrivals()
    assert abs(sum(arrival.adapter == 0 for arrival in skewed) / len(skewed) - 0.59) < 0.02
    assert [one.at_s for one in skewed] == sorted(one.at_s for one in skewed)
    assert abs(skewed[-1].at_s - 2000) < 100
    assert {8 <= one.num_prompt < 512 and 8 <= one.num_output < 512 for one in skewed} == {True}
