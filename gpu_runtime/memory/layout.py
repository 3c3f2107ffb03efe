"""Owns what a page means as a KV block: 16 tokens of K and V for all layers, so that a request has one block table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpu_runtime.memory.pages import PAGE_ALIGNMENT, PagePool


@dataclass(frozen=True)
class PageLayout:
    """Shape of a page. `widest_row_bytes` is the longest adapter rank row that a page must be able to hold (0: none).

    Raises ValueError where such a row does not fit: `fitting` chooses more tokens a page instead.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype = torch.float32
    tokens_per_page: int = 16
    widest_row_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "tokens_per_page"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.page_bytes % PAGE_ALIGNMENT:
            raise ValueError(f"a page of {self.page_bytes} bytes is not a multiple of {PAGE_ALIGNMENT}: change tokens_per_page")
        if self.page_bytes < self.widest_row_bytes:
            raise ValueError(
                f"tokens_per_page is {self.tokens_per_page}, so a page has {self.page_bytes} bytes, but an adapter's rank row "
                f"may take {self.widest_row_bytes}: raise tokens_per_page"
            )

    @classmethod
    def fitting(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype, widest_row_bytes: int, tokens_per_page: int = 16
    ) -> PageLayout:
        """The layout with the fewest tokens a page, doubling from `tokens_per_page`, that holds the widest rank row."""
        layout = cls(num_layers, num_kv_heads, head_dim, kv_dtype, tokens_per_page)
        while layout.page_bytes < widest_row_bytes:
            layout = replace(layout, tokens_per_page=2 * layout.tokens_per_page)
        return replace(layout, widest_row_bytes=widest_row_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.token_bytes * self.tokens_per_page

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_page)


def kv_view(pool: PagePool, layout: PageLayout) -> torch.Tensor:
    """The pool as KV blocks (P, L, 2, kv_heads, tokens_per_page, head_dim); K is index 0 of the third axis.

    One head's block of keys is contiguous, which is what attention streams.
    """
    assert pool.page_bytes == layout.page_bytes, f"pool pages have {pool.page_bytes} bytes, the layout {layout.page_bytes}"
    shape = (pool.num_pages, layout.num_layers, 2, layout.num_kv_heads, layout.tokens_per_page, layout.head_dim)
    return pool.data.view(layout.kv_dtype).view(shape)
