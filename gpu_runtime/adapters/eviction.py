"""Which idle adapter leaves the pool first. Least recently used now; a cost model replaces `least_recently_used` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_runtime.core import AdapterKey


@dataclass(frozen=True)
class IdleAdapter:
    """`wanted`: queued requests wait for it. `last_used` grows with every release."""

    key: AdapterKey
    num_pages: int
    last_used: int
    wanted: bool


EvictionPolicy = Callable[[Iterable[IdleAdapter]], IdleAdapter]


def least_recently_used(idle: Iterable[IdleAdapter]) -> IdleAdapter:
    """The victim: unwanted before wanted, then longest unused."""
    return min(idle, key=lambda adapter: (adapter.wanted, adapter.last_used))
