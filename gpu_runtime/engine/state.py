"""What an engine tells the outside about itself: immutable, safe to read from any thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpu_runtime.core import AdapterKey

Tier = Literal["pool", "host", "disk"]
Condition = Literal["starting", "ready", "draining", "stopped", "failed"]


@dataclass(frozen=True)
class ResidentAdapter:
    """An adapter that this process holds, with the tier nearest to the kernels."""

    key: AdapterKey
    tier: Tier


@dataclass(frozen=True)
class EngineState:
    """Snapshot after a step. Pages count the whole pool; `num_free_pages` excludes pages of idle adapters, which are evictable."""

    condition: Condition
    num_queued: int
    num_running: int
    num_pages: int
    num_free_pages: int
    page_bytes: int
    max_rank: int
    num_slots: int
    residents: tuple[ResidentAdapter, ...] = ()
