"""Host tier, flights, slots, handles, eviction and drop, one at a time; test_stateful.py throws all of them together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpu_runtime.adapters.eviction import IdleAdapter, cheapest_to_lose
from gpu_runtime.adapters.flights import Executor
from gpu_runtime.adapters.host import HostCache
from gpu_runtime.adapters.image import AdapterImage
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import AdapterKey
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.tables import SlotTables
from tests.runtime.engine.ledger import LAYOUT, LedgerPuller, make_image
from tests.runtime.engine.rig import HeldExecutor, InlineExecutor

A, B, C = (AdapterKey("t", f"{weight}/3") for weight in (1, 2, 3))  # rank 3: two pages each
IMAGE_BYTES = make_image(1, 3).num_bytes


def make_residency(
    *, num_pages: int = 8, num_slots: int = 4, host_images: int = 8, num_threads: int = 2, executor: Executor | None = None
) -> Residency:
    pool = PagePool(num_pages=num_pages, page_bytes=LAYOUT.page_bytes, poison_freed=True)
    return Residency(
        pool=pool,
        tables=SlotTables(num_slots=num_slots, num_layers=1, max_rank=8),
        puller=LedgerPuller(),  # type: ignore[arg-type] # made images in place of pulled ones
        host=HostCache(max_bytes=host_images * IMAGE_BYTES),
        executor=executor or InlineExecutor(),
        num_pull_threads=num_threads,
    )


def bring(residency: Residency, *keys: AdapterKey) -> None:
    for key in keys:
        residency.want(key, grant=None)
        assert residency.poll() == []
        residency.release(residency.acquire(key))
        residency.unwant(key)
        residency.check_integrity()


# ---- host tier ----


def test_host_keeps_its_budget_and_the_recently_used() -> None:
    host = HostCache(max_bytes=2 * IMAGE_BYTES)
    host.put(A, make_image(1, 3))
    host.put(B, make_image(2, 3))
    assert host.get(A) is not None
    host.put(C, make_image(3, 3))
    assert host.keys() == (A, C)
    host.put(A, make_image(1, 3))
    host.check_integrity()


def test_host_never_evicts_what_is_wanted() -> None:
    host = HostCache(max_bytes=IMAGE_BYTES)
    host.pin(A)
    host.put(A, make_image(1, 3))
    host.pin(B)
    host.put(B, make_image(2, 3))
    host.put(C, make_image(3, 3))
    assert set(host.keys()) == {A, B}
    assert host.pinned_bytes == 2 * IMAGE_BYTES
    host.unpin(A)
    assert host.keys() == (B,)
    host.drop(B)
    assert host.pinned_bytes == 0
    assert host.num_pins(B) == 1
    host.check_integrity()


# ---- flights ----


def test_pulls_begin_in_order_and_are_bounded() -> None:
    executor = HeldExecutor()
    residency = make_residency(executor=executor, num_threads=2)
    for key in (A, B, C, A):
        residency.want(key, grant=None)
    assert len(executor.jobs) == 2
    executor.release(1)
    residency.poll()
    assert residency.is_ready(A)
    assert len(executor.jobs) == 2
    residency.unwant(C)
    executor.release()
    residency.poll()
    assert residency.is_ready(C), "it had begun"


def test_a_pull_that_nobody_waits_for_never_begins() -> None:
    executor = HeldExecutor()
    residency = make_residency(executor=executor, num_threads=1)
    residency.want(A, grant=None)
    residency.want(B, grant=None)
    residency.unwant(B)
    executor.release()
    residency.poll()
    assert executor.jobs == []
    assert not residency.is_ready(B)


def test_a_full_host_tier_holds_pulls_back_but_not_the_urgent_one() -> None:
    executor = HeldExecutor()
    residency = make_residency(executor=executor, host_images=1, num_threads=1)
    for key in (A, B, C):
        residency.want(key, grant=None)
    executor.release()
    residency.poll()
    assert residency.is_ready(A)
    assert executor.jobs == []
    residency.ensure(C, grant=None, urgent=True)
    executor.release()
    residency.poll()
    assert residency.is_ready(C)
    assert not residency.is_ready(B)
    residency.check_integrity()


def test_pulls_run_off_the_step_thread_and_wake_it() -> None:
    woken = threading.Event()
    executor = ThreadPoolExecutor(2)
    residency = make_residency(executor=executor)
    residency.wake_with(woken.set)
    residency.want(A, grant=None)
    assert woken.wait(10)
    assert residency.poll() == []
    assert residency.is_ready(A)
    residency.close()
    executor.shutdown()


# ---- pool ----


def test_handles_count_and_share_a_slot() -> None:
    residency = make_residency()
    residency.want(A, grant=None)
    residency.poll()
    first, second = residency.acquire(A), residency.acquire(A)
    assert first.slot == second.slot
    residency.release(first)
    assert residency.num_idle_pages == 0
    with pytest.raises(AssertionError, match="twice"):
        residency.release(first)
    residency.release(second)
    assert residency.num_idle_pages == 2


def test_the_least_recently_used_idle_adapter_leaves() -> None:
    residency = make_residency(num_pages=6, num_slots=2)
    bring(residency, A, B, A, C)
    assert residency.tiers()[0] == (A, C)
    assert residency.num_evictions == 1
    assert residency.reclaimer.reclaim(6)
    assert residency.tiers()[0] == ()
    assert not residency.reclaimer.reclaim(7)


def test_one_in_use_is_never_evicted() -> None:
    residency = make_residency(num_pages=4, num_slots=2)
    bring(residency, A)
    handle = residency.acquire(A)
    assert not residency.reclaimer.reclaim(3)
    residency.want(B, grant=None)
    residency.want(C, grant=None)
    residency.poll()
    assert residency.can_acquire(B, num_kv_pages=0)
    assert not residency.can_acquire(B, num_kv_pages=1)
    residency.release(handle)
    assert residency.can_acquire(B, num_kv_pages=2)
    assert residency.can_acquire(A, num_kv_pages=2)
    assert not residency.can_acquire(A, num_kv_pages=3), "it must not be evicted for itself"


def test_slots_run_out_like_pages() -> None:
    residency = make_residency(num_slots=1)
    bring(residency, A)
    residency.want(B, grant=None)
    residency.poll()
    handle = residency.acquire(A)
    assert not residency.can_acquire(B, num_kv_pages=0)
    residency.release(handle)
    assert residency.can_acquire(B, num_kv_pages=0)
    residency.release(residency.acquire(B))
    assert residency.tiers()[0] == (B,)


def test_eviction_order_spares_the_wanted() -> None:
    idle = [IdleAdapter(A, 2, last_used=1, wanted=True), IdleAdapter(B, 2, last_used=3, wanted=False), IdleAdapter(C, 2, 2, wanted=False)]
    assert cheapest_to_lose(idle).key == C


# ---- drop ----


def test_drop_of_an_idle_adapter_is_done_at_once() -> None:
    residency = make_residency()
    bring(residency, A)
    assert residency.drop(A).done()
    assert residency.tiers() == ((), (), ())
    residency.check_integrity()


def test_drop_waits_for_handles_while_the_same_adapter_may_come_again() -> None:
    residency = make_residency()
    bring(residency, A)
    old = residency.acquire(A)
    done = residency.drop(A)
    assert not residency.is_ready(A)
    bring(residency, A)
    new = residency.acquire(A)
    assert new.slot != old.slot
    residency.check_integrity()
    assert not done.done()
    residency.release(old)
    assert done.done()
    residency.check_integrity()


def test_a_pull_after_a_drop_is_another_flight() -> None:
    executor = HeldExecutor()
    residency = make_residency(executor=executor, num_threads=4)
    residency.want(A, grant="old")
    done = residency.drop(A)
    residency.ensure(A, grant="new", urgent=True)
    pull_old, forget, pull_new = executor.jobs
    executor.jobs = []
    pull_new()
    residency.poll()
    assert residency.is_ready(A)
    forget()
    pull_old()
    residency.poll()
    assert not done.done()
    executor.release()
    assert done.done()
    assert residency.is_ready(A)


class GrantReadingPuller(LedgerPuller):
    """Refuses expired grants, as the registry does."""

    def pull(self, key: AdapterKey, *, grant: str | None) -> AdapterImage:
        self.grants = [*getattr(self, "grants", []), grant]
        if grant == "expired":
            raise AdapterUnavailable("the grant has expired", retryable=True)
        return super().pull(key, grant=grant)


def with_grants(*, num_threads: int) -> tuple[Residency, HeldExecutor, GrantReadingPuller]:
    executor, puller = HeldExecutor(), GrantReadingPuller()
    residency = make_residency(executor=executor, num_threads=num_threads)
    residency._puller = puller  # type: ignore[assignment]
    residency._flights._pull = lambda key, grant: puller.pull(key, grant=grant)
    return residency, executor, puller


def test_a_later_request_lends_its_grant_to_a_pull_that_has_not_begun() -> None:
    residency, executor, puller = with_grants(num_threads=1)
    residency.want(B, grant="other")
    residency.want(A, grant="expired")
    residency.want(A, grant="fresh")
    executor.release()
    assert residency.poll() == []
    executor.release()
    assert residency.poll() == []
    assert puller.grants == ["other", "fresh"]


def test_an_expired_grant_does_not_fail_who_waits_with_a_fresh_one() -> None:
    residency, executor, puller = with_grants(num_threads=2)
    residency.want(A, grant="expired")
    residency.want(A, grant="fresh")
    executor.release()
    assert residency.poll() == []
    executor.release()
    assert residency.poll() == []
    assert residency.is_ready(A)
    assert puller.grants == ["expired", "fresh"]


def test_the_second_try_is_the_last() -> None:
    residency, executor, puller = with_grants(num_threads=2)
    residency.want(A, grant="expired")
    residency.want(A, grant="expired")
    executor.release()
    assert residency.poll() == []
    residency.want(A, grant="expired")
    executor.release()
    assert [failure.key for failure in residency.poll()] == [A]
    assert len(puller.grants) == 2


def test_the_step_thread_never_waits_for_a_pull() -> None:
    """A pull that takes long: wanting, polling and dropping come back at once."""
    begun, free = threading.Event(), threading.Event()

    class SlowPuller(LedgerPuller):
        def pull(self, key: AdapterKey, *, grant: str | None) -> AdapterImage:
            begun.set()
            assert free.wait(30)
            return super().pull(key, grant=grant)

    executor = ThreadPoolExecutor(1)
    residency = make_residency(executor=executor)
    residency._puller = SlowPuller()  # type: ignore[assignment]
    residency._flights._pull = lambda key, grant: residency._puller.pull(key, grant=grant)
    calls: list[Callable[[], object]] = [lambda: residency.want(A, grant=None), residency.poll, lambda: residency.drop(A)]
    for call in calls:
        started = time.monotonic()
        call()
        assert time.monotonic() - started < 1.0
        assert begun.wait(30)
    free.set()
    executor.shutdown()
