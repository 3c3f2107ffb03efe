"""What an engine tells the outside about itself: immutable, safe to read from any thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gpu_runtime.adapters.pull import PullCounts
from gpu_runtime.core import AdapterKey

Tier = Literal["pool", "host", "disk"]
IDLE = "idle_"
Condition = Literal["starting", "ready", "draining", "stopped", "failed"]


@dataclass(frozen=True)
class ResidentAdapter:
    """An adapter that this process holds, with the tier nearest to the kernels; `rank` where that is the pool."""

    key: AdapterKey
    tier: Tier
    rank: int | None = None


@dataclass(frozen=True)
class EngineCounts:
    """What has happened since the start. `batch_sizes`: requests in a step -> how many steps had that many."""

    num_step_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_loads: int = 0
    load_s: float = 0.0
    num_evictions: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_prefix_evictions: int = 0
    num_merges: int = 0
    merge_s: float = 0.0
    num_moved_pages: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    pulls: PullCounts = field(default_factory=PullCounts)


@dataclass(frozen=True)
class EngineState:
    """Snapshot after a step. `num_free_pages` excludes what is idle, which leaves under pressure.

    `pages` by use, together all of the pool: free, kv, prefix, adapter, merged, and what is idle of the last three.
    `unused_bytes` lie in pages that are held and hold nothing: page ends of adapters, blocks that requests have yet to fill.
    """

    condition: Condition
    num_queued: int
    num_running: int
    num_pages: int
    num_free_pages: int
    page_bytes: int
    max_rank: int
    num_slots: int
    residents: tuple[ResidentAdapter, ...] = ()
    pages: Mapping[str, int] = field(default_factory=dict)
    unused_bytes: int = 0
    running_adapters: frozenset[AdapterKey] = frozenset()
    waiting_adapters: frozenset[AdapterKey] = frozenset()
    counts: EngineCounts = field(default_factory=EngineCounts)

    @property
    def num_idle_pages(self) -> int:
        """Held by nobody who uses them."""
        return sum(count for use, count in self.pages.items() if use.startswith(IDLE))
