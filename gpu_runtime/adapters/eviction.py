"""Which idle adapter leaves the pool first: the one whose place costs least to take.

The expected cost of losing an adapter is (chance that it is used again) x (cost to bring it back), and what losing it frees
is its bytes. The cost to bring back grows with the bytes too, so per byte freed it is the chance, times what a byte costs
where the adapter would come from: the host tier copies it, the disk or the registry must pull it first. The chance is a
count of uses that halves every HALF_LIFE_USES uses of any adapter, kept for adapters that have left as well: a popular one
that was evicted once is not a stranger when it comes back (Chameleon, arXiv 2411.17741, evicts by a like score).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_runtime.core import AdapterKey

HALF_LIFE_USES = 512
MAX_REMEMBERED = 8192
PULL_COST = 5.0  # of a byte that must be read, hashed and laid out, in copies of one that lies ready on the host


@dataclass(frozen=True)
class IdleAdapter:
    """`wanted`: queued requests wait for it. `last_used` grows with every use; `chance` is `ReuseHistory.chance`."""

    key: AdapterKey
    num_pages: int
    last_used: int
    wanted: bool
    chance: float = 0.0
    on_host: bool = True


EvictionPolicy = Callable[[Iterable[IdleAdapter]], IdleAdapter]


def cheapest_to_lose(idle: Iterable[IdleAdapter]) -> IdleAdapter:
    """The victim: unwanted before wanted, then the least expected cost a byte; of equals the longest unused."""
    return min(idle, key=lambda adapter: (adapter.wanted, adapter.chance * _byte_cost(adapter), adapter.last_used))


def _byte_cost(adapter: IdleAdapter) -> float:
    return 1.0 if adapter.on_host else 1.0 + PULL_COST


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
