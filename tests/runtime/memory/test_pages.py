"""PagePool: what a random history may never break, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_runtime.memory.pages import POISON, PagePool, PoolFull

NUM_PAGES = 12


class PoolHistory(RuleBasedStateMachine):
    """Owners allocate, write and free; a page is never two owners', and old bytes are gone when it is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(num_pages=NUM_PAGES, page_bytes=32, poison_freed=True)
        self.held: dict[str, list[int]] = {}

    @rule(owner=st.sampled_from("abcde"), count=st.integers(0, NUM_PAGES + 2))
    def allocate(self, owner: str, count: int) -> None:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(PoolFull, match=f"wanted {count} pages, {free} are free"):
                self.pool.allocate(count, owner=owner)
            assert self.pool.num_free == free
            return
        pages = self.pool.allocate(count, owner=owner)
        assert len(pages) == count
        assert bool((self.pool.data[pages] == POISON).all())
        self.pool.data[pages] = ord(owner)
        self.held.setdefault(owner, []).extend(pages)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(owner for owner, pages in self.held.items() if pages)))
        gone = data.draw(st.lists(st.sampled_from(self.held[owner]), unique=True))
        self.pool.free(gone)
        self.held[owner] = [page for page in self.held[owner] if page not in gone]

    @invariant()
    def is_sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free + sum(map(len, self.held.values())) == NUM_PAGES
        assert self.pool.pages_by_owner() == {owner: len(pages) for owner, pages in self.held.items() if pages}
        for owner, pages in self.held.items():
            assert bool((self.pool.data[pages] == ord(owner)).all()), "another owner wrote into these pages"


TestPoolHistory = PoolHistory.TestCase
TestPoolHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_freeing_what_is_free_or_named_twice_frees_nothing() -> None:
    pool = PagePool(num_pages=4, page_bytes=32)
    pages = pool.allocate(3, owner="a")
    pool.free(pages[:1])
    for wrong in ([pages[1], pages[0]], [pages[1], pages[1]], [99]):
        with pytest.raises(AssertionError):
            pool.free(wrong)
        assert pool.num_free == 2
    pool.check_integrity()


def test_integrity_notices_a_write_into_a_free_page() -> None:
    pool = PagePool(num_pages=4, page_bytes=32, poison_freed=True)
    pool.data[2, 5] = 0
    with pytest.raises(AssertionError, match="a free page was written to"):
        pool.check_integrity()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_pages": 0, "page_bytes": 32}, "num_pages is 0"),
        ({"num_pages": 1, "page_bytes": 24}, "page_bytes is 24"),
        ({"num_pages": 2**20, "page_bytes": 2**20}, "use a smaller pool"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PagePool(**arguments)


def test_poison_is_nan_in_every_stored_dtype() -> None:
    raw = torch.full((16,), POISON, dtype=torch.uint8)
    assert all(raw.view(dtype).isnan().all() for dtype in (torch.float32, torch.float16, torch.bfloat16))
