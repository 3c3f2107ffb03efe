"""Order, budget and admission of steps, without a model: the scheduler is pure."""

from __future__ import annotations

import pytest

from gpu_runtime.adapters.host import HostCache
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.core import AdapterKey, Request, RequestState, SamplingParams
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.scheduling.admission import Limits
from gpu_runtime.scheduling.planner import Planner, Rules
from gpu_runtime.scheduling.queues import Queue, Ticket
from gpu_runtime.scheduling.scheduler import Schedule, Scheduler
from tests.runtime.engine.ledger import LAYOUT, LedgerPuller
from tests.runtime.engine.rig import HeldExecutor

A, B = AdapterKey("t", "1/3"), AdapterKey("t", "2/3")  # two pages each


class Bench:
    """A scheduler on a small pool (4 tokens a page) and what its steps did."""

    def __init__(self, *, num_pages: int = 40, batch: int = 4, step_tokens: int = 12, num_slots: int = 4) -> None:
        self.pool = PagePool(num_pages=num_pages, page_bytes=LAYOUT.page_bytes, poison_freed=True)
        self.executor = HeldExecutor()
        self.residency = Residency(
            pool=self.pool,
            tables=SlotTables(num_slots=num_slots, num_layers=1, max_rank=8),
            puller=LedgerPuller(),  # type: ignore[arg-type] # made images in place of pulled ones
            host=HostCache(max_bytes=10**6),
            executor=self.executor,
            num_pull_threads=4,
        )
        limits = Limits(num_pages, batch, step_tokens, max_model_len=200, max_waiting=100)
        planner = Planner(Rules(), num_places=batch, max_step_tokens=step_tokens)
        self.scheduler = Scheduler(limits=limits, layout=LAYOUT, pool=self.pool, residency=self.residency, planner=planner)

    def add(
        self, name: str, num_prompt: int, *, max_tokens: int = 8, adapter: AdapterKey | None = None, deadline_s: float | None = None
    ) -> Request:
        request = Request(name, (1,) * num_prompt, SamplingParams(max_tokens=max_tokens), adapter, arrived_s=0.0, deadline_s=deadline_s)
        self.scheduler.add(request, grant=None, seed=0)
        return request

    def step(self, now_s: float = 0.0) -> dict[str, int]:
        """Tokens by request in the order in which the step takes them; afterwards every sampling request has one more."""
        schedule = self.schedule(now_s)
        taken = {item.request.request_id: item.end - item.start for item in schedule.items}
        for item in schedule.items:
            samples, item.request.num_computed = item.samples, item.end
            if samples:
                item.request.output_ids.append(7)
                if len(item.request.output_ids) == item.request.params.max_tokens:
                    self.scheduler.finish(item.ticket)
        self.scheduler.check_integrity()
        return taken

    def schedule(self, now_s: float = 0.0) -> Schedule:
        schedule = self.scheduler.schedule(now_s)
        self.scheduler.check_integrity()
        return schedule


def test_prefill_is_cut_into_chunks_and_mixed_with_decode() -> None:
    bench = Bench()
    bench.add("a", 5)
    bench.add("b", 20)
    assert bench.step() == {"a": 5, "b": 7}
    assert bench.step() == {"a": 1, "b": 11}
    assert bench.step() == {"a": 1, "b": 2}
    assert bench.step() == {"a": 1, "b": 1}


def test_first_come_first_served_among_prompts() -> None:
    bench = Bench()
    for name in "abc":
        bench.add(name, 10)
    assert bench.step() == {"a": 10, "b": 2}
    assert bench.step() == {"a": 1, "b": 8, "c": 3}


def test_a_step_never_exceeds_its_tokens_or_places() -> None:
    bench = Bench(batch=3, step_tokens=6)
    for at in range(8):
        bench.add(f"r{at}", 1 + 3 * at, max_tokens=1 + at)
    while bench.scheduler.waiting or bench.scheduler.running:
        taken = bench.step()
        assert 0 < sum(taken.values()) <= 6
        assert len(taken) <= 3


def test_an_adapter_on_its_way_blocks_nobody_and_keeps_its_place() -> None:
    bench = Bench(batch=2)
    bench.add("slow", 2, adapter=A)
    bench.add("b", 2)
    assert bench.step() == {"b": 2}
    bench.add("c", 2)
    bench.add("d", 2)
    bench.executor.release()
    assert bench.step() == {"b": 1, "slow": 2}


def test_one_that_merely_does_not_fit_is_not_passed_by() -> None:
    bench = Bench(num_pages=10, step_tokens=40)
    bench.add("a", 20)
    bench.add("large", 28)
    bench.add("small", 2)
    assert bench.step() == {"a": 20}
    assert bench.step() == {"a": 1}


def test_pages_of_the_adapter_count_at_admission() -> None:
    bench = Bench(num_pages=10, step_tokens=64)
    bench.add("a", 19, adapter=A, max_tokens=4)
    bench.add("b", 3, adapter=B, max_tokens=4)
    bench.executor.release()
    assert bench.step() == {"a": 19}, "5 + 2 pages are taken, 1 + 2 fit, but not with the page that a may need next"
    bench = Bench(num_pages=11, step_tokens=64)
    bench.add("a", 19, adapter=A, max_tokens=4)
    bench.add("b", 3, adapter=B, max_tokens=4)
    bench.executor.release()
    assert bench.step() == {"a": 19, "b": 3}


def test_idle_adapters_leave_before_anyone_is_preempted() -> None:
    bench = Bench(num_pages=8)
    bench.add("first", 3, adapter=A, max_tokens=1)
    bench.executor.release()
    bench.step()
    assert bench.residency.num_idle_pages == 2
    bench.add("long", 12, max_tokens=20)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    assert bench.residency.num_evictions == 1
    assert bench.scheduler.num_preemptions == 0


def test_the_youngest_is_preempted_and_comes_back_in_its_place() -> None:
    bench = Bench(num_pages=12)
    old, young = bench.add("old", 8, max_tokens=30), bench.add("young", 4, max_tokens=30)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert old.state is RequestState.RUNNING
    assert (young.state, young.num_computed, young.pages) == (RequestState.WAITING, 0, [])
    bench.add("later", 4)
    produced = list(young.output_ids)
    while bench.scheduler.running or bench.scheduler.waiting:
        order = list(bench.step())
        assert order == sorted(order, key=["old", "young", "later"].index) or "young" not in order
    assert young.output_ids[: len(produced)] == produced
    assert len(young.output_ids) == len(old.output_ids) == 30
    assert bench.pool.num_free == 12


def test_the_oldest_always_moves() -> None:
    """However tight the pool, the oldest running request advances in every step: nobody can starve."""
    bench = Bench(num_pages=9, step_tokens=16)
    for at in range(6):
        bench.add(f"r{at}", 6, max_tokens=20, adapter=[None, A, B][at % 3])
    bench.executor.release()
    for _ in range(500):
        bench.executor.release()
        oldest = min([*bench.scheduler.running, *bench.scheduler.waiting], key=lambda ticket: ticket.order, default=None)
        taken = bench.step()
        if oldest is None:
            break
        assert oldest.request.request_id in taken
    assert bench.scheduler.num_preemptions > 0
    assert not bench.scheduler.running


@pytest.mark.parametrize("failing", [True, False])
def test_deadlines_and_failed_pulls_end_waiting_requests_only(failing: bool) -> None:
    bench = Bench()
    bench.add("runs", 4, deadline_s=1.0)
    bench.step()
    bench.add("waits", 4, adapter=A, deadline_s=None if failing else 1.0)
    if failing:
        bench.residency._puller.failing.add(A)  # type: ignore[attr-defined]
        bench.executor.release()
    (failed,) = bench.schedule(now_s=2.0).failed
    assert failed.request.request_id == "waits"
    assert ("told to fail" if failing else "deadline") in failed.reason
    assert len(bench.scheduler.running) == 1


def test_limits_name_what_to_change() -> None:
    limits = Limits(num_pages=4, max_batch_requests=1, max_step_tokens=8, max_model_len=100, max_waiting=1)

    def ask(num_prompt: int, max_tokens: int, num_adapter_pages: int = 0) -> None:
        request = Request("r", (1,) * num_prompt, SamplingParams(max_tokens=max_tokens), None, arrived_s=0.0)
        limits.require_possible(request, layout=LAYOUT, num_adapter_pages=num_adapter_pages)

    ask(8, 8)
    ask(4, 4, num_adapter_pages=2)
    for arguments, says in (((9, 8), "5 pages"), ((4, 5, 2), "2 for the adapter"), ((60, 41), "at most 100"), ((0, 1), "empty")):
        with pytest.raises(ValueError, match=says):
            ask(*arguments)


def test_a_queue_keeps_the_order_of_arrival() -> None:
    queue = Queue(RequestState.WAITING)
    tickets = [Ticket(Request(f"r{at}", (1,), SamplingParams(), None, arrived_s=0.0), at, None, 0) for at in range(4)]
    for at in (2, 0, 3, 1):
        queue.add(tickets[at])
    assert [ticket.order for ticket in queue] == [0, 1, 2, 3]
    assert queue.youngest is tickets[3]
    queue.remove(tickets[1])
    assert tickets[1] not in queue
    assert queue.find("r1") is None
    queue.check_integrity()
