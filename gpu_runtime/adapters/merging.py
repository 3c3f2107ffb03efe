"""Owns merged mode: one adapter's delta added into a copy of the weights, in the pool, and whose copy the model reads.

Base weights are only ever read, so switching back is exact. The copy lies in the merge range, a fixed place for each
matrix, of which a merge takes the pages of those that the adapter touches: what is idle there leaves or moves, what is in
use moves. After `unmerge` the copy stays as long as nothing else wants its pages, so that merging again is free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from gpu_runtime.adapters.residency import Residency
from gpu_runtime.core import TARGETS, AdapterKey
from gpu_runtime.kernels.backend import AdapterTables, BaseMatrix, Decoder, Kernels, PackedWeight
from gpu_runtime.memory.merge_range import MergeRange, place, range_pages
from gpu_runtime.memory.pages import PagePool

log = logging.getLogger(__name__)

OWNER = "merged"
WRITE_COST = 3.0  # of a merged byte, in copies of one: the base's is read, A and B's are multiplied, the sum is written


@dataclass(frozen=True)
class IdleCopy:
    """Merged weights that no step uses. Its `chance` is 0: it is kept for nothing while anything else wants the pages."""

    num_pages: int
    last_used: int = 0
    wanted: bool = False
    chance: float = 0.0
    byte_cost: float = WRITE_COST


@dataclass(frozen=True)
class _Copy:
    key: AdapterKey
    matrices: tuple[int, ...]
    pages: tuple[int, ...]


class Merging:
    """`max_share` of the pool's pages may be the merge range; where it would take more, `why_off` says so and nothing merges."""

    def __init__(
        self,
        *,
        pool: PagePool,
        tables: AdapterTables,
        residency: Residency,
        decoder: Decoder,
        kernels: Kernels,
        max_share: float,
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._residency = residency
        self._decoder = decoder
        self._kernels = kernels
        self._followers: list[Callable[[Mapping[int, int]], None]] = [residency.moved]
        self._copy: _Copy | None = None
        self.merged: AdapterKey | None = None  # whose weights the model reads now; None: the base model's
        self.num_merges = 0  # copies written; a merge that found its copy is none
        self.num_moved_pages = 0
        self.merge_s = 0.0
        self._range, self.why_off = _reserve(pool, decoder.matrices, max_share=max_share)
        residency.reclaimer.add(self)

    def follow(self, moved: Callable[[Mapping[int, int]], None]) -> None:
        """`moved` is told of pages that were copied, old -> new, before the step that would read them."""
        self._followers.append(moved)

    # ---- switching, between steps ----

    def can_merge(self, key: AdapterKey) -> bool:
        """Whether `merge(key)` would find the adapter here and room for its copy."""
        if self._range is None or not self._residency.is_ready(key):
            return False
        if self._copy is not None and self._copy.key == key:
            return True
        pages = self._range.pages_of(self._touched(key))
        held = 0 if self._copy is None or self.merged is None else len(self._copy.pages)  # another's, in use until then
        return self._residency.can_acquire(key, num_kv_pages=len(pages) - held)

    def merge(self, key: AdapterKey) -> None:
        """The model reads `key`'s merged weights from the next step on. Only after `can_merge`."""
        if self.merged == key:
            return
        self.unmerge()
        if self._copy is None or self._copy.key != key:
            self._let_go()
            self._copy = self._write(key)
        for at in self._copy.matrices:
            self._decoder.point(at, self._merged_weight(at))
        self.merged = key

    def unmerge(self) -> None:
        """The model reads the base weights again."""
        if self.merged is None:
            return
        assert self._copy is not None, f"{self.merged} is merged without a copy"
        for at in self._copy.matrices:
            self._decoder.point(at, self._decoder.matrices[at].weight)
        self.merged = None

    def forget(self, key: AdapterKey) -> None:
        """A dropped adapter leaves nothing behind: its copy is zeroed and its pages are free."""
        if self._copy is not None and self._copy.key == key:
            self.unmerge()
            self._pool.data[list(self._copy.pages)] = 0
            self._let_go()

    # ---- what it lends ----

    @property
    def num_idle_pages(self) -> int:
        return 0 if self._copy is None or self.merged is not None else len(self._copy.pages)

    def offers(self) -> Iterator[tuple[IdleCopy, Callable[[], None]]]:
        """See `reclaim.Lender`."""
        if self.num_idle_pages:
            yield IdleCopy(self.num_idle_pages), self._let_go

    @property
    def num_held_pages(self) -> int:
        return 0 if self._copy is None else len(self._copy.pages)

    @property
    def copied(self) -> AdapterKey | None:
        """Whose merged weights lie in the pool, in use or not."""
        return None if self._copy is None else self._copy.key

    def check_integrity(self) -> None:
        """The copy has its pages, nobody else's, and the model reads a copy only while one is merged."""
        owned = self._pool.pages_by_owner().get(OWNER, 0)
        assert owned == self.num_held_pages, f"merged weights own {owned} pages of the pool, {self.num_held_pages} are known"
        assert self.merged is None or self.merged == self.copied, f"{self.merged} is merged, the copy is of {self.copied}"
        if self._copy is not None:
            assert all(self._pool.owner_of(page) == OWNER for page in self._copy.pages), "merged weights lost a page"

    # ---- inside ----

    def _touched(self, key: AdapterKey) -> tuple[int, ...]:
        """Matrices that the adapter's delta changes."""
        sites = {(site.layer, TARGETS.index(site.target)) for site in self._residency.plan_of(key).sites}
        matrices = enumerate(self._decoder.matrices)
        return tuple(at for at, one in matrices if any((one.layer, target) in sites for target in one.sites.targets))

    def _write(self, key: AdapterKey) -> _Copy:
        assert self._range is not None, f"merged mode is off: {self.why_off}"
        started = time.monotonic()
        handle = self._residency.acquire(key)
        matrices = self._touched(key)
        pages = self._range.pages_of(matrices)
        self._vacate(pages)
        self._pool.claim(pages, owner=OWNER)
        for at in matrices:
            self._write_matrix(at, handle.slot)
        self._residency.release(handle)
        self.num_merges += 1
        self.merge_s += time.monotonic() - started
        log.debug("adapter.merged", extra={"form_digest": key.form_digest, "num_pages": len(pages)})
        return _Copy(key, matrices, pages)

    def _write_matrix(self, at: int, slot: int) -> None:
        one = self._decoder.matrices[at]
        self._kernels.merge(
            self._place(at), weight=one.weight, pool=self._pool.data, tables=self._tables, slot=slot, layer=one.layer, sites=one.sites
        )

    def _vacate(self, pages: Sequence[int]) -> None:
        """Nobody's bytes lie in `pages` afterwards: the cheapest idle things leave the pool until what remains there fits elsewhere."""
        enough = self._residency.reclaimer.reclaim(len(pages))
        assert enough, f"a merge was begun without room for {len(pages)} pages"
        held = [page for page in pages if self._pool.owner_of(page) is not None]
        moved = self._pool.relocate(held, avoiding=pages)
        self.num_moved_pages += len(moved)
        for follow in self._followers:
            follow(moved)

    def _let_go(self) -> None:
        assert self.merged is None, "merged weights are freed while the model reads them"
        if self._copy is not None:
            self._pool.free(self._copy.pages)
        self._copy = None

    def _place(self, at: int) -> torch.Tensor:
        """Where matrix `at` has its merged copy, in the shape and dtype of the packed base weight."""
        assert self._range is not None, f"merged mode is off: {self.why_off}"
        like, start = self._decoder.matrices[at].weight.data, self._range.starts[at]
        return self._pool.data.view(-1)[start : start + self._range.sizes[at]].view(like.dtype).view(like.shape)

    def _merged_weight(self, at: int) -> PackedWeight:
        return PackedWeight(self._place(at), self._decoder.matrices[at].weight.num_out)


def _reserve(pool: PagePool, matrices: Sequence[BaseMatrix], *, max_share: float) -> tuple[MergeRange | None, str | None]:
    """Set the pool's merge range, or say why there is none. Matrices of the same targets lie side by side."""
    sizes = [one.weight.data.numel() * one.weight.data.itemsize for one in matrices]
    num_pages = range_pages(sizes, page_bytes=pool.page_bytes)
    if num_pages > max_share * pool.num_pages:
        share = f"merge_share {max_share:g} allows {int(max_share * pool.num_pages)}"
        return None, f"merged weights would take {num_pages} of the pool's {pool.num_pages} pages, {share}"
    pool.set_range(num_pages)
    order = sorted(range(len(matrices)), key=lambda at: (matrices[at].sites.targets, matrices[at].layer))
    return place(sizes, order=order, first_page=pool.first_range_page, page_bytes=pool.page_bytes), None
