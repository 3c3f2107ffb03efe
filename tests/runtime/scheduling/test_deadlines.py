"""Who cannot make its deadline ends at once; arrivals are counted as arrivals."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_runtime.core import Request, SamplingParams
from gpu_runtime.scheduling.cost import CostTable
from gpu_runtime.scheduling.deadlines import ArrivalRate, Forecast
from gpu_runtime.scheduling.queues import Ticket

COST = CostTable(step_s=10e-3, request_s=0.0, token_s=1e-3, lora_s=0.0, adapter_s=0.0, rank_s=0.0, switch_s=0.0)
FORECAST = Forecast(COST, num_places=4, max_step_tokens=100)


def make(order: int, *, deadline_s: float | None, num_prompt: int = 100, max_tokens: int = 100) -> Ticket:
    request = Request(f"r{order}", (1,) * num_prompt, SamplingParams(max_tokens=max_tokens), None, arrived_s=0.0, deadline_s=deadline_s)
    return Ticket(request, order, None, 0)


@pytest.mark.parametrize("rate", [0.2, 3.0, 40.0])
def test_the_rate_is_that_of_arrivals(rate: float) -> None:
    """S-LoRA's estimate is whole requests and shrinks when requests leave; a rate below one a round is none there."""
    arrivals = ArrivalRate(memory_s=60.0)
    times = np.random.RandomState(1).exponential(1 / rate, int(rate * 600)).cumsum()
    for at in times:
        arrivals.arrived(float(at))
    assert arrivals.per_s(float(times[-1])) == pytest.approx(rate, rel=0.5 if rate < 1 else 0.25)
    assert arrivals.per_s(float(times[-1]) + 600.0) < rate / 100


def test_the_first_arrivals_already_tell() -> None:
    arrivals = ArrivalRate()
    assert arrivals.per_s(5.0) == 0.0
    for at in range(4):
        arrivals.arrived(float(at))
    assert arrivals.per_s(3.0) == pytest.approx(1.0, rel=0.1)


def test_only_who_cannot_make_it_is_ended() -> None:
    own_s = FORECAST.prefill_s(make(0, deadline_s=None).request)
    assert own_s == pytest.approx(10e-3 + 100e-3)
    late, just = make(0, deadline_s=own_s - 0.01), make(1, deadline_s=own_s + 0.01)
    assert FORECAST.hopeless([late, just, make(2, deadline_s=None)], num_free=4, now_s=0.0) == [late]
    assert FORECAST.hopeless([just], num_free=4, now_s=0.02) == [just]


def test_what_is_queued_ahead_counts_and_those_that_end_make_room() -> None:
    share_s = FORECAST.share_s(make(0, deadline_s=None).request)
    ahead = [make(at, deadline_s=None) for at in range(10)]
    last = make(10, deadline_s=6 * share_s)
    assert FORECAST.hopeless([*ahead, last], num_free=0, now_s=0.0) == [last]
    hopeless = [make(at, deadline_s=0.01) for at in range(10)]
    assert FORECAST.hopeless([*hopeless, last], num_free=0, now_s=0.0) == hopeless


def test_when_to_come_again_grows_with_the_load() -> None:
    line = [make(at, deadline_s=None) for at in range(20)]
    share_s = FORECAST.share_s(line[0].request)
    idle, busy = (FORECAST.retry_after_s(line, arrivals_per_s=load / share_s) for load in (0.0, 0.8))
    assert 1 <= idle < busy <= 60
    assert FORECAST.retry_after_s(line, arrivals_per_s=2 / share_s) == 60
    assert FORECAST.retry_after_s([], arrivals_per_s=9.0) == 1
