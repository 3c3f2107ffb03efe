"""Tenants share by weight; one alone is first come, first served."""

from __future__ import annotations

from gpu_runtime.core import Request, SamplingParams
from gpu_runtime.scheduling.fair import FairShare
from gpu_runtime.scheduling.queues import Ticket


def make(order: int, tenant: str, *, num_prompt: int = 10) -> Ticket:
    request = Request(f"r{order}", (1,) * num_prompt, SamplingParams(max_tokens=5), None, arrived_s=0.0, tenant=tenant)
    return Ticket(request, order, None, 0)


def serve(fair: FairShare, waiting: list[Ticket], rounds: int) -> dict[str, int]:
    """Prompt tokens by tenant, one request a round, everyone replaced at once."""
    served: dict[str, int] = {}
    for at in range(rounds):
        ticket = fair.order(waiting)[0]
        fair.served(ticket.request, start=0, end=10)
        served[ticket.request.tenant] = served.get(ticket.request.tenant, 0) + 10
        waiting.remove(ticket)
        fresh = make(1000 + at, ticket.request.tenant)
        fair.arrive(fresh.request)
        fair.leave(ticket.request)
        waiting.append(fresh)
        fair.check_integrity()
    return served


def test_one_tenant_is_first_come_first_served() -> None:
    fair = FairShare()
    tickets = [make(at, "a", num_prompt=1 + at % 7) for at in range(9)]
    for ticket in tickets:
        fair.arrive(ticket.request)
    assert fair.order(tickets) == tickets


def test_a_flood_does_not_delay_the_others() -> None:
    fair = FairShare()
    waiting = [make(at, "flood") for at in range(50)] + [make(60, "quiet")]
    for ticket in waiting:
        fair.arrive(ticket.request)
    assert [ticket.request.tenant for ticket in fair.order(waiting)[:3]].count("quiet") == 1


def test_service_follows_the_weights() -> None:
    fair = FairShare({"a": 1.0, "b": 3.0}.__getitem__)
    waiting = [make(at, "ab"[at % 2]) for at in range(6)]
    for ticket in waiting:
        fair.arrive(ticket.request)
    served = serve(fair, waiting, 80)
    assert 2.8 <= served["b"] / served["a"] <= 3.2


def test_output_counts_twice() -> None:
    fair = FairShare()
    ticket = make(0, "a", num_prompt=10)
    fair.arrive(ticket.request)
    fair.served(ticket.request, start=4, end=13)
    assert fair.counter("a") == 6 * 1.0 + 3 * 2.0


def test_idle_time_is_not_saved_up() -> None:
    fair = FairShare()
    busy, late = make(0, "busy"), make(1, "late")
    fair.arrive(busy.request)
    fair.served(busy.request, start=0, end=10)
    fair.arrive(late.request)
    assert fair.counter("late") == fair.counter("busy") == 10.0


def test_leaving_and_coming_back_does_not_wash_a_tenant_clean() -> None:
    fair = FairShare()
    heavy, other = make(0, "heavy"), make(1, "other")
    fair.arrive(heavy.request)
    fair.arrive(other.request)
    fair.served(heavy.request, start=0, end=10)
    fair.leave(heavy.request)
    fair.arrive(heavy.request)
    assert fair.counter("heavy") == 10.0
    fair.leave(heavy.request)
    fair.leave(other.request)
    fair.check_integrity()
