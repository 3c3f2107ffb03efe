"""Owns the pool's bytes and who holds each page. Knows nothing of what lies inside a page.

Only the step thread allocates and frees, so there is no lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PAGE_ALIGNMENT = 16  # bytes; slot tables count in this unit
POISON = 0xFF  # NaN in f32, f16 and bf16 alike, so that a kernel which trusts old bytes is caught


class PoolFull(Exception):
    """Too few free pages; nothing was allocated. A state of the pool that the scheduler answers, not a defect."""

    def __init__(self, *, wanted: int, free: int) -> None:
        super().__init__(f"wanted {wanted} pages, {free} are free")
        self.wanted = wanted
        self.free = free


class PagePool:
    """`num_pages` pages of `page_bytes` bytes each in one contiguous uint8 tensor `data` (P, page_bytes).

    With `poison_freed` every page is filled with 0xFF at the start and again whenever it is freed.
    Raises ValueError for sizes that cannot hold a pool.
    """

    def __init__(self, *, num_pages: int, page_bytes: int, device: str = "cpu", poison_freed: bool = False) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a pool needs at least 1: give it more bytes")
        if page_bytes < PAGE_ALIGNMENT or page_bytes % PAGE_ALIGNMENT:
            raise ValueError(f"page_bytes is {page_bytes}; it must be a positive multiple of {PAGE_ALIGNMENT}")
        if num_pages * page_bytes // PAGE_ALIGNMENT >= 2**31:
            raise ValueError(f"{num_pages} pages of {page_bytes} bytes pass 32 GiB, the reach of 32-bit slot tables: use a smaller pool")
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.poison_freed = poison_freed
        self.data = torch.zeros((num_pages, page_bytes), dtype=torch.uint8, device=device)
        if poison_freed:
            self.data.fill_(POISON)
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: list[str | None] = [None] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int, *, owner: str) -> list[int]:
        """`count` pages for `owner`, most recently freed first. Raises PoolFull, and then allocates nothing."""
        assert count >= 0, f"cannot allocate {count} pages"
        if count > len(self._free):
            raise PoolFull(wanted=count, free=len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = owner
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back. A page that is free already, or named twice, is our own defect: nothing is freed then."""
        assert len(set(pages)) == len(pages), f"pages freed twice in one call: {list(pages)}"
        for page in pages:
            assert self.owner_of(page) is not None, f"page {page} is free already"
        for page in reversed(pages):
            self._owners[page] = None
            self._free.append(page)
        if self.poison_freed and pages:
            self.data[list(pages)] = POISON

    def owner_of(self, page: int) -> str | None:
        assert 0 <= page < self.num_pages, f"page {page} is not in a pool of {self.num_pages}"
        return self._owners[page]

    def pages_by_owner(self) -> dict[str, int]:
        """Number of pages each owner holds."""
        counts: dict[str, int] = {}
        for owner in self._owners:
            if owner is not None:
                counts[owner] = counts.get(owner, 0) + 1
        return counts

    def check_integrity(self) -> None:
        """Every page is either free or owned, none twice, and free pages are poisoned where that is asked for."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice on the free list"
        for page, owner in enumerate(self._owners):
            assert (owner is None) == (page in free), f"page {page} has owner {owner!r} but free is {page in free}"
        if self.poison_freed and self._free:
            assert bool((self.data[self._free] == POISON).all()), "a free page was written to"
