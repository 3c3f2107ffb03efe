"""`python -m tests.bench.eviction`: bytes loaded by the pool's eviction cost beside LRU, on S-LoRA's trace; pure counting, no clock.

Each request acquires its adapter, holds it while the next `HELD` requests come, and releases it. Ranks are mixed, so
adapters differ in pages. The floor is what must be loaded whatever the policy: every adapter's first time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gpu_runtime.adapters.eviction import EvictionPolicy, IdleAdapter, ReuseHistory, cheapest_to_lose
from gpu_runtime.core import AdapterKey
from tests.bench.rows import Row, finish
from tests.bench.workload import SloraTrace

RANK_PAGES = (4, 8, 16, 32)  # of ranks 8, 16, 32, 64
HELD = 15
BAR = 1.0
POOL_PAGES = 600
CELLS = ((0.1, False), (0.3, False), (0.6, False), (1.0, False), (0.1, True), (0.3, True))


@dataclass(frozen=True)
class Loaded:
    num_pages: int
    first_time_pages: int


def replay(trace: SloraTrace, *, victim: EvictionPolicy, pool_pages: int, turned: bool = False) -> Loaded:
    """Pages loaded into a pool of `pool_pages` for adapters alone. `turned`: half-way, popularity turns round among the adapters."""
    history, resident, last_used = ReuseHistory(), set[int](), dict[int, int]()
    held: deque[int] = deque()
    loaded = first = 0
    arrivals = trace.arrivals()
    for now, arrival in enumerate(arrivals):
        adapter = trace.num_adapters - 1 - arrival.adapter if turned and now > len(arrivals) // 2 else arrival.adapter
        pages = _pages(adapter)
        held.append(adapter)
        if len(held) > HELD:
            held.popleft()
        first += 0 if adapter in last_used else pages
        if adapter not in resident:
            loaded += pages
            while sum(map(_pages, resident)) + pages > pool_pages:
                idle = [
                    IdleAdapter(_key(one), _pages(one), last_used[one], wanted=False, chance=history.chance(_key(one)))
                    for one in resident
                    if one not in held
                ]
                resident.discard(int(victim(idle).key.form_digest))
            resident.add(adapter)
        history.used(_key(adapter))
        last_used[adapter] = now
    return Loaded(loaded, first)


def _key(adapter: int) -> AdapterKey:
    return AdapterKey("t", str(adapter))


def _pages(adapter: int) -> int:
    return RANK_PAGES[adapter % len(RANK_PAGES)]


def least_recently_used(idle: Iterable[IdleAdapter]) -> IdleAdapter:
    """The peer: unwanted before wanted, then longest unused."""
    return min(idle, key=lambda adapter: (adapter.wanted, adapter.last_used))


def rows(*, short: bool) -> list[Row]:
    """A row a popularity, bytes loaded over LRU's; uniform popularity leaves nothing to know, so that one is reported."""
    return [_row(alpha, turned, duration_s=60 if short else 150) for alpha, turned in CELLS]


def _row(alpha: float, turned: bool, *, duration_s: float) -> Row:
    trace = SloraTrace(num_adapters=200, alpha=alpha, rate=20, duration_s=duration_s)
    ours = replay(trace, victim=cheapest_to_lose, pool_pages=POOL_PAGES, turned=turned)
    lru = replay(trace, victim=least_recently_used, pool_pages=POOL_PAGES, turned=turned)
    return Row(
        f"eviction cost / LRU, bytes loaded, alpha {alpha:g}{', turned' if turned else ''}",
        ours.num_pages / lru.num_pages,
        BAR if alpha < 1 else None,
        "python -m tests.bench.eviction",
        at_most=True,
        floor=ours.first_time_pages / lru.num_pages,
        detail=f"{ours.num_pages} / {lru.num_pages} pages, {int(20 * duration_s)} requests of S-LoRA's trace",
    )


if __name__ == "__main__":
    finish(rows(short=False))
