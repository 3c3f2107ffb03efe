"""What leaves the pool first of all that nothing uses now: that whose place costs least to take.

The expected cost of losing an adapter is (chance that it is used again) x (cost to bring it back), and what losing it frees
is its bytes. The cost to bring back grows with the bytes too, so per byte freed it is the chance, times what a byte costs
where the adapter would come from: the host tier copies it, the disk or the registry must pull it first. The chance is a
count of uses that halves every HALF_LIFE_USES uses of any adapter, kept for adapters that have left as well: a popular one
that was evicted once is not a stranger when it comes back (Chameleon, arXiv 2411.17741, evicts by a like score).
Prefix pages and merged weights are held to the same cost, with what it takes to compute them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gpu_runtime.core import AdapterKey

HALF_LIFE_USES = 512
MAX_REMEMBERED = 8192
PULL_COST = 5.0  # of a byte that must be read, hashed and laid out, in copies of one that lies ready on the host


class Idle(Protocol):
    """Pages that nothing uses now.

    num_pages   that its leaving frees
    last_used   grows with every use of anything
    wanted      queued requests wait for it
    chance      that it is used again, as a decayed count of uses
    byte_cost   of bringing a byte back, in copies of one from the host
    """

    @property
    def num_pages(self) -> int: ...
    @property
    def last_used(self) -> int: ...
    @property
    def wanted(self) -> bool: ...
    @property
    def chance(self) -> float: ...
    @property
    def byte_cost(self) -> float: ...


@dataclass(frozen=True)
class IdleAdapter:
    """See `Idle`; `chance` is `ReuseHistory.chance`."""

    key: AdapterKey
    num_pages: int
    last_used: int
    wanted: bool
    chance: float = 0.0
    on_host: bool = True

    @property
    def byte_cost(self) -> float:
        return 1.0 if self.on_host else 1.0 + PULL_COST


IdleT = TypeVar("IdleT", bound=Idle)


def cheapest_to_lose(idle: Iterable[IdleT]) -> IdleT:
    """The victim: unwanted before wanted, then the least expected cost a byte; of equals the longest unused."""
    return min(idle, key=lambda one: (one.wanted, one.chance * one.byte_cost, one.last_used))


class EvictionPolicy(Protocol):
    """Chooses one of at least one."""

    def __call__(self, idle: Iterable[IdleT]) -> IdleT: ...


class ReuseHistory:
    """Decayed counts of uses. Of more than `max_remembered` adapters the less likely half is forgotten."""

    def __init__(self, *, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._counts: dict[AdapterKey, tuple[float, int]] = {}  # count as it was, and the use it was then
        self._num_uses = 0

    def used(self, key: AdapterKey) -> None:
        count = self.chance(key)
        self._num_uses += 1
        self._counts[key] = (count + 1.0, self._num_uses)
        if len(self._counts) > self._max_remembered:
            self._forget_half()

    def chance(self, key: AdapterKey) -> float:
        """How often `key` was used lately, as of now; 0 for a stranger."""
        count, at = self._counts.get(key, (0.0, self._num_uses))
        return float(count * 0.5 ** ((self._num_uses - at) / HALF_LIFE_USES))

    def forget(self, key: AdapterKey) -> None:
        """A dropped adapter leaves no trace."""
        self._counts.pop(key, None)

    def _forget_half(self) -> None:
        likely = sorted(self._counts, key=self.chance, reverse=True)[: self._max_remembered // 2]
        self._counts = {key: self._counts[key] for key in likely}
