"""What lies where in the pool: counts by use for metrics, and the whole map for people who look. Step thread only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Protocol

from gpu_runtime.adapters.merging import Merging
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.scheduling.prefixes import Prefixes


class _Holder(Protocol):
    @property
    def num_held_pages(self) -> int: ...
    @property
    def num_idle_pages(self) -> int: ...


def pages_by_use(pool: PagePool, residency: Residency, prefixes: Prefixes, merging: Merging) -> dict[str, int]:
    """Together all pages of the pool."""
    held: dict[str, _Holder] = {"adapter": residency, "prefix": prefixes, "merged": merging}
    busy = {use: one.num_held_pages - one.num_idle_pages for use, one in held.items()}
    idle = {f"idle_{use}": one.num_idle_pages for use, one in held.items()}
    kv = pool.num_pages - pool.num_free - sum(busy.values()) - sum(idle.values())
    return {"free": pool.num_free, "kv": kv, **busy, **idle}


def snapshot(pool: PagePool, residency: Residency, prefixes: Prefixes, merging: Merging) -> dict[str, Any]:
    """Plain values for `/debug/state`: the pool's runs of pages by owner, slots, prefixes and merged mode."""
    return {
        "pool": {
            "num_pages": pool.num_pages,
            "page_bytes": pool.page_bytes,
            "first_range_page": pool.first_range_page,
            "pages": pages_by_use(pool, residency, prefixes, merging),
            "runs": list(_runs(pool)),
        },
        "slots": residency.slots(),
        "prefixes": {"enabled": prefixes.enabled, **vars(prefixes.counts)},
        "merged": {
            "adapter": None if merging.merged is None else merging.merged._asdict(),
            "copy_of": None if merging.copied is None else merging.copied._asdict(),
            "off": merging.why_off,
            "num_merges": merging.num_merges,
            "num_moved_pages": merging.num_moved_pages,
        },
    }


def _runs(pool: PagePool) -> Iterator[dict[str, Any]]:
    """Neighbouring pages of one owner, in the order of the pool; owner None is free."""
    for owner, pages in groupby(range(pool.num_pages), key=pool.owner_of):
        run = list(pages)
        yield {"first": run[0], "count": len(run), "owner": owner}
