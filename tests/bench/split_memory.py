"""Split memory, for the benchmark alone: a fixed share of the pool's pages is for adapters, the rest for K and V.

What every system but S-LoRA does. The same pool, scheduler and eviction as the unified one; only the two budgets differ.
"""

from __future__ import annotations

from typing import Any

from gpu_runtime.adapters.handle import Resident
from gpu_runtime.adapters.reclaim import Reclaimer
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.core import AdapterKey
from gpu_runtime.memory.pages import PagePool


class SplitReclaimer(Reclaimer):
    """Answers for K and V: idle adapters never make room for them."""

    def __init__(self, pool: PagePool, residency: SplitResidency) -> None:
        super().__init__(pool)
        self._residency = residency

    @property
    def num_idle_pages(self) -> int:
        """K and V may take what is free of their own share, which is all that callers add this to."""
        return self._residency.num_free_kv_pages - self._pool.num_free

    def reclaim(self, num_pages: int) -> bool:
        return num_pages <= self._residency.num_free_kv_pages


class SplitResidency(Residency):
    """Adapters within `adapter_pages` of the pool."""

    def __init__(self, *, adapter_pages: int, pool: PagePool, **parts: Any) -> None:
        super().__init__(pool=pool, **parts)
        self._adapter_pages = adapter_pages
        self.reclaimer = SplitReclaimer(pool, self)

    @property
    def num_free_kv_pages(self) -> int:
        return self._pool.num_free - (self._adapter_pages - self.num_held_pages)

    def can_acquire(self, key: AdapterKey, *, num_kv_pages: int) -> bool:
        if num_kv_pages > self.num_free_kv_pages:
            return False
        if key in self._residents:
            return True
        has_slot = bool(self._free_slots) or bool(self.num_idle_pages)
        return has_slot and self.num_held_pages - self.num_idle_pages + (self.num_pages(key) or 0) <= self._adapter_pages

    def _load(self, key: AdapterKey) -> Resident:
        while self.num_held_pages + (self.num_pages(key) or 0) > self._adapter_pages:
            self._evict_for_slot()
        return super()._load(key)
