"""Owns taking back what lies idle in the pool: adapters, prefix pages and merged weights leave by one cost. Step thread only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from gpu_runtime.adapters.eviction import EvictionPolicy, Idle, cheapest_to_lose
from gpu_runtime.memory.pages import PagePool


class Lender(Protocol):
    """Whoever keeps pages in the pool that nothing uses now."""

    @property
    def num_idle_pages(self) -> int:
        """Pages that would be free if all that is idle left."""
        ...

    def offers(self) -> Iterable[tuple[Idle, Callable[[], None]]]:
        """What may leave next, and what makes it leave. None left out while `num_idle_pages` is above 0 and nothing else offers."""
        ...


@dataclass(frozen=True)
class _Offer:
    """An `Idle` that knows how to leave."""

    num_pages: int
    last_used: int
    wanted: bool
    chance: float
    byte_cost: float
    leave: Callable[[], None]


class Reclaimer:
    """`victim` chooses among what all lenders offer."""

    def __init__(self, pool: PagePool, *, victim: EvictionPolicy = cheapest_to_lose) -> None:
        self._pool = pool
        self._victim = victim
        self._lenders: list[Lender] = []

    def add(self, lender: Lender) -> None:
        self._lenders.append(lender)

    @property
    def num_idle_pages(self) -> int:
        """Pages that `reclaim` could free."""
        return sum(lender.num_idle_pages for lender in self._lenders)

    def reclaim(self, num_pages: int) -> bool:
        """Let idle things leave until `num_pages` pages are free. False if that is impossible; then nothing more is idle."""
        while self._pool.num_free < num_pages:
            if not self._evict_one():
                return False
        return True

    def _evict_one(self) -> bool:
        offers = [_offer(idle, leave) for lender in self._lenders for idle, leave in lender.offers()]
        if not offers:
            return False
        self._victim(offers).leave()
        return True


def _offer(idle: Idle, leave: Callable[[], None]) -> _Offer:
    return _Offer(idle.num_pages, idle.last_used, idle.wanted, idle.chance, idle.byte_cost, leave)
