"""Who is where: pool <- host <- (disk <- source, by flights). Slots, counted handles, eviction, drop. Step thread only.

An adapter in the pool is *resident*: it has pages and a slot. With live handles it is in use and never moved; without, it
is *idle* and leaves under pressure. `drop` takes the pointer away at once; the pages follow when the last handle is back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpu_runtime.adapters.eviction import EvictionPolicy, IdleAdapter, ReuseHistory, cheapest_to_lose
from gpu_runtime.adapters.flights import Executor, Flights, Landing
from gpu_runtime.adapters.forgetting import Forgetting
from gpu_runtime.adapters.handle import Drop, Handle, Resident
from gpu_runtime.adapters.host import HostCache
from gpu_runtime.adapters.image import AdapterImage
from gpu_runtime.adapters.pull import PullCounts, Puller
from gpu_runtime.adapters.reclaim import Reclaimer
from gpu_runtime.core import AdapterKey
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.plan import AdapterPlan
from gpu_runtime.memory.tables import SlotTables

log = logging.getLogger(__name__)

OWNER_PREFIX = "adapter:"


@dataclass(frozen=True)
class PullFailure:
    """The pull of `key` ended without an adapter: its waiting requests fail, the next one tries again."""

    key: AdapterKey
    reason: str
    retryable: bool


class Residency:
    """Owns every adapter page of `pool` and every slot of `tables`."""

    def __init__(
        self,
        *,
        pool: PagePool,
        tables: SlotTables,
        puller: Puller,
        host: HostCache,
        executor: Executor,
        num_pull_threads: int,
        victim: EvictionPolicy = cheapest_to_lose,
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._puller = puller
        self._host = host
        self._victim = victim
        self.history = ReuseHistory()
        self.reclaimer = Reclaimer(pool, victim=victim)
        self.reclaimer.add(self)
        self._flights = Flights(lambda key, grant: puller.pull(key, grant=grant), executor=executor, num_threads=num_pull_threads)
        self._forgetting = Forgetting(puller=puller, flights=self._flights)
        self._residents: dict[AdapterKey, Resident] = {}
        self._draining: list[Resident] = []
        self._free_slots = list(range(tables.num_slots - 1, -1, -1))
        self._clock = 0
        self.num_evictions = 0
        self.num_loads = 0
        self.load_s = 0.0  # spent on copies into the pool
        self._urgent: AdapterKey | None = None

    def wake_with(self, wake: Callable[[], None]) -> None:
        """`wake` is called from another thread when `poll` has something to do."""
        self._flights.wake_with(wake)

    # ---- wanting: from queueing to admission ----

    def want(self, key: AdapterKey, *, grant: str | None) -> None:
        """A request waits for `key`: it starts on its way, and once here stays on the host until as many `unwant`."""
        self._host.pin(key)
        self._flights.refresh(key, grant=grant)
        self.ensure(key, grant=grant, urgent=False)

    def unwant(self, key: AdapterKey) -> None:
        self._host.unpin(key)
        if not self._host.num_pins(key):
            self._flights.withdraw(key)

    def ensure(self, key: AdapterKey, *, grant: str | None, urgent: bool) -> None:
        """See that a wanted adapter is here or on its way. `urgent`: the oldest waiting request needs it."""
        if not self.is_ready(key):
            self._flights.request(key, grant=grant)
        if urgent:
            self._urgent = key
        self._start_pulls()

    def is_ready(self, key: AdapterKey) -> bool:
        """Whether `acquire` needs no pull."""
        return key in self._residents or key in self._host

    def num_pages(self, key: AdapterKey) -> int | None:
        """Pages that the adapter takes in the pool; None before it is here. Any thread."""
        if (resident := self._residents.get(key)) is not None:
            return len(resident.pages)
        image = self._host.peek(key)
        return None if image is None else image.num_pages

    def plan_of(self, key: AdapterKey) -> AdapterPlan:
        """Of an adapter that is ready."""
        if (resident := self._residents.get(key)) is not None:
            return resident.plan
        image = self._host.peek(key)
        assert image is not None, f"{key} is neither in the pool nor on the host"
        return image.plan

    def poll(self) -> list[PullFailure]:
        """Take what has landed into the host tier; the pulls that failed."""
        failures = [failure for landing in self._flights.take_landed() if (failure := self._land(landing))]
        self._start_pulls()
        return failures

    # ---- using ----

    def can_acquire(self, key: AdapterKey, *, num_kv_pages: int) -> bool:
        """Whether `acquire(key)` and then `num_kv_pages` pages can be had, evicting idle adapters."""
        resident = self._residents.get(key)
        own = len(resident.pages) if resident is not None and resident.num_handles == 0 else 0
        wanted = num_kv_pages + (0 if resident else self.num_pages(key) or 0)
        has_slot = resident is not None or bool(self._free_slots) or bool(self._idle())
        return has_slot and wanted <= self._pool.num_free + self.reclaimer.num_idle_pages - own

    def acquire(self, key: AdapterKey) -> Handle:
        """A handle on `key`, loaded from the host tier if it is not resident. Only after `can_acquire`."""
        resident = self._residents.get(key) or self._load(key)
        resident.num_handles += 1
        self.history.used(key)
        self._touch(resident)
        return Handle(resident)

    def release(self, handle: Handle) -> None:
        """Give a handle back; the adapter stays as long as nothing needs its place."""
        assert not handle.released, f"a handle on {handle.resident.key} is released twice"
        handle.released = True
        resident = handle.resident
        resident.num_handles -= 1
        self._touch(resident)
        if resident.num_handles == 0 and resident.drop is not None:
            self._draining.remove(resident)
            self._erase(resident, resident.drop)

    @property
    def num_idle_pages(self) -> int:
        """Pages of adapters that nothing uses."""
        return sum(len(resident.pages) for resident in self._idle())

    def offers(self) -> Iterator[tuple[IdleAdapter, Callable[[], None]]]:
        """See `reclaim.Lender`."""
        for resident in self._idle():
            yield self._as_idle(resident), partial(self._evict, resident)

    def moved(self, pages: Mapping[int, int]) -> None:
        """Pages were copied, old -> new: who lies in them follows."""
        for resident in (*self._residents.values(), *self._draining):
            if mine := {old: pages[old] for old in resident.pages if old in pages}:
                resident.pages = [mine.get(page, page) for page in resident.pages]
                self._tables.move(resident.slot, mine, page_bytes=self._pool.page_bytes)

    @property
    def num_held_pages(self) -> int:
        """Pages that adapters have in the pool, those that drain among them."""
        return sum(len(resident.pages) for resident in (*self._residents.values(), *self._draining))

    @property
    def num_unused_bytes(self) -> int:
        """Of pages held by adapters: page ends that no row fits into."""
        held = (*self._residents.values(), *self._draining)
        return sum(len(resident.pages) * self._pool.page_bytes - resident.plan.weight_bytes for resident in held)

    def slots(self) -> dict[int, dict[str, Any]]:
        """Who lies in each slot that is taken, as plain values."""
        held = (*self._residents.values(), *self._draining)
        return {one.slot: one.described() for one in sorted(held, key=lambda one: one.slot)}

    @property
    def pull_counts(self) -> PullCounts:
        return self._puller.counts

    def ranks(self) -> dict[AdapterKey, int]:
        """Of the adapters in the pool."""
        return {key: resident.plan.rank for key, resident in self._residents.items()}

    def tiers(self) -> tuple[tuple[AdapterKey, ...], tuple[AdapterKey, ...], tuple[AdapterKey, ...]]:
        """Keys in the pool, on the host, on the disk: each under every tier that holds it."""
        return tuple(self._residents), self._host.keys(), self._puller.disk_keys()

    # ---- forgetting ----

    def drop(self, key: AdapterKey) -> Future[None]:
        """Forget `key` in every tier. Later requests pull it anew; those that use it now finish first; then its pages are zeroed."""
        drop = Drop()
        self.history.forget(key)
        self._host.drop(key)
        if (resident := self._residents.pop(key, None)) is not None:
            drop.wait_for()
            resident.drop = drop
            if resident.num_handles:
                self._draining.append(resident)
            else:
                self._erase(resident, drop)
        self._forgetting.begin(key, drop)
        drop.one_done()
        log.info("adapter.dropped", extra={"tenant": key.tenant, "form_digest": key.form_digest})
        return drop.future

    def close(self) -> None:
        self._flights.close()

    def check_integrity(self) -> None:
        """Pages, slots and handles of this class agree with pool and tables; host and disk keep their budgets."""
        held = [*self._residents.values(), *self._draining]
        slots = [resident.slot for resident in held]
        assert sorted([*slots, *self._free_slots]) == list(range(self._tables.num_slots)), f"slots {slots} and free {self._free_slots}"
        assert not self._tables.ranks[self._free_slots].any(), "a free slot still points into the pool"
        pages = [page for resident in held for page in resident.pages]
        assert len(set(pages)) == len(pages), "two adapters share a page"
        for resident in held:
            assert resident.num_handles >= 0, f"{resident.key} has {resident.num_handles} handles"
            assert all(self._pool.owner_of(page) == _owner(resident.key) for page in resident.pages), f"{resident.key} lost a page"
        for resident in self._draining:
            assert resident.num_handles > 0, f"{resident.key} drains without handles"
            assert resident.drop is not None, f"{resident.key} drains without a drop"
        owned = sum(count for owner, count in self._pool.pages_by_owner().items() if owner.startswith(OWNER_PREFIX))
        assert owned == len(pages), f"adapters own {owned} pages of the pool, {len(pages)} are known"
        self._tables.check_integrity()
        self._host.check_integrity()

    # ---- inside ----

    def _land(self, landing: Landing) -> PullFailure | None:
        if not landing.wanted:
            self._forgetting.landed(landing.key)
            return None
        if landing.image is not None:
            self._host.put(landing.key, landing.image)
            return None
        assert landing.failure is not None, "a landing has an image or a failure"
        log.warning("adapter.pull_refused", extra={"form_digest": landing.key.form_digest, "reason": landing.failure.reason})
        return PullFailure(landing.key, landing.failure.reason, landing.failure.retryable)

    def _start_pulls(self) -> None:
        self._flights.start(room=self._host.pinned_bytes < self._host.max_bytes, urgent=self._urgent)

    def _touch(self, resident: Resident) -> None:
        self._clock += 1
        resident.last_used = self._clock

    def _load(self, key: AdapterKey) -> Resident:
        image = self._host.get(key)
        assert image is not None, f"{key} is not on the host: it cannot be acquired"
        if not self._free_slots:
            self._evict_for_slot()
        self.reclaimer.reclaim(image.num_pages)
        pages = self._pool.allocate(image.num_pages, owner=_owner(key), from_range=True)
        resident = Resident(key, self._free_slots.pop(), pages, image.plan)
        started = time.monotonic()
        self._copy(image, resident)
        self.num_loads += 1
        self.load_s += time.monotonic() - started
        self._residents[key] = resident
        log.debug("adapter.loaded", extra={"form_digest": key.form_digest, "num_pages": image.num_pages, "slot": resident.slot})
        return resident

    def _copy(self, image: AdapterImage, resident: Resident) -> None:
        for page, source in zip(resident.pages, image.data, strict=True):
            self._pool.data[page].copy_(source)
        self._tables.install(resident.slot, image.plan, resident.pages, image.scales, image.dtype)

    def _idle(self) -> list[Resident]:
        return [resident for resident in self._residents.values() if resident.num_handles == 0]

    def _as_idle(self, resident: Resident) -> IdleAdapter:
        key = resident.key
        wanted, chance = self._host.num_pins(key) > 0, self.history.chance(key)
        return IdleAdapter(key, len(resident.pages), resident.last_used, wanted=wanted, chance=chance, on_host=key in self._host)

    def _evict_for_slot(self) -> None:
        self._evict(self._residents[self._victim(map(self._as_idle, self._idle())).key])

    def _evict(self, victim: Resident) -> None:
        del self._residents[victim.key]
        self._vacate(victim)
        self.num_evictions += 1
        log.debug("adapter.evicted", extra={"form_digest": victim.key.form_digest})

    def _vacate(self, resident: Resident) -> None:
        self._tables.clear(resident.slot)
        self._free_slots.append(resident.slot)
        self._pool.free(resident.pages)

    def _erase(self, resident: Resident, drop: Drop) -> None:
        self._pool.data[resident.pages] = 0
        self._vacate(resident)
        drop.one_done()


def _owner(key: AdapterKey) -> str:
    return f"{OWNER_PREFIX}{key.tenant}/{key.form_digest}"
