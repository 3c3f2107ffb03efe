"""Owns the pool's bytes and who holds each page. Knows nothing of what lies inside a page.

Only the step thread allocates and frees, so there is no lock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
        self.first_range_page = num_pages
        self.page_bytes = page_bytes
        self.poison_freed = poison_freed
        self.data = torch.zeros((num_pages, page_bytes), dtype=torch.uint8, device=device)
        if poison_freed:
            self.data.fill_(POISON)
        self._free = list(range(num_pages - 1, -1, -1))
        self._free_range: list[int] = []
        self._owners: list[str | None] = [None] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._free_range)

    def set_range(self, num_pages: int) -> None:
        """Make the last `num_pages` pages the merge range, while nothing is allocated.

        Adapters and prefixes get its pages first and KV gets them last, so that a merge finds there what can leave.
        """
        assert 0 <= num_pages < self.num_pages, f"a merge range of {num_pages} pages in a pool of {self.num_pages}"
        assert self.num_free == self.num_pages, "the merge range is set before pages are lent"
        self.first_range_page = self.num_pages - num_pages
        self._free = list(range(self.first_range_page - 1, -1, -1))
        self._free_range = list(range(self.num_pages - 1, self.first_range_page - 1, -1))

    def allocate(self, count: int, *, owner: str, from_range: bool = False) -> list[int]:
        """`count` pages for `owner`, most recently freed first, those of the merge range last, or first with `from_range`.

        Raises PoolFull, and then allocates nothing.
        """
        assert count >= 0, f"cannot allocate {count} pages"
        if count > self.num_free:
            raise PoolFull(wanted=count, free=self.num_free)
        first, second = (self._free_range, self._free) if from_range else (self._free, self._free_range)
        pages = [(first or second).pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = owner
        return pages

    def claim(self, pages: Collection[int], *, owner: str) -> None:
        """Take exactly these pages, all of them free."""
        wanted = set(pages)
        for page in wanted:
            assert self.owner_of(page) is None, f"page {page} belongs to {self.owner_of(page)}"
            self._owners[page] = owner
        self._free = [page for page in self._free if page not in wanted]
        self._free_range = [page for page in self._free_range if page not in wanted]

    def hand_over(self, page: int, *, owner: str) -> None:
        """A page that is owned belongs to `owner` from now on, bytes and all."""
        assert self.owner_of(page) is not None, f"page {page} is free: it cannot be handed over"
        self._owners[page] = owner

    def relocate(self, pages: Collection[int], *, avoiding: Collection[int]) -> dict[int, int]:
        """Copy owned pages to free ones outside `avoiding`, owner and all, and free them: old page -> new page.

        Whoever holds them must follow before the next step. Raises PoolFull, and then moves nothing.
        """
        forbidden = set(avoiding)
        rooms = [page for page in (*self._free_range, *self._free) if page not in forbidden][::-1]  # those of the range last
        if len(rooms) < len(pages):
            raise PoolFull(wanted=len(pages), free=len(rooms))
        moved = dict(zip(pages, rooms, strict=False))
        for old, new in moved.items():
            self._owners[new] = self._owners[old]
            self.data[new].copy_(self.data[old])
        self._free = [page for page in self._free if self._owners[page] is None]
        self._free_range = [page for page in self._free_range if self._owners[page] is None]
        self.free(list(pages))
        return moved

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back. A page that is free already, or named twice, is our own defect: nothing is freed then."""
        assert len(set(pages)) == len(pages), f"pages freed twice in one call: {list(pages)}"
        for page in pages:
            assert self.owner_of(page) is not None, f"page {page} is free already"
        for page in reversed(pages):
            self._owners[page] = None
            (self._free if page < self.first_range_page else self._free_range).append(page)
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
        free = {*self._free, *self._free_range}
        assert len(free) == self.num_free, "a page is twice on the free list"
        for page, owner in enumerate(self._owners):
            assert (owner is None) == (page in free), f"page {page} has owner {owner!r} but free is {page in free}"
        assert all(page < self.first_range_page for page in self._free), "a page of the merge range is lent as any other"
        assert all(page >= self.first_range_page for page in self._free_range), "the merge range has a page of another place"
        if self.poison_freed and free:
            assert bool((self.data[sorted(free)] == POISON).all()), "a free page was written to"
