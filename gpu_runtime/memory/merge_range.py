"""Owns where merged weights lie: one fixed offset a matrix, at the high end of the pool. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

ALIGNMENT = 128  # bytes; what wide loads and tensor cores ask of a matrix


@dataclass(frozen=True)
class MergeRange:
    """`starts` in bytes from the pool's start and `sizes`, by matrix."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    page_bytes: int

    def pages_of(self, matrices: Iterable[int]) -> tuple[int, ...]:
        """Pages that hold any byte of these matrices, in order."""
        spans = ((self.starts[at] // self.page_bytes, (self.starts[at] + self.sizes[at] - 1) // self.page_bytes) for at in matrices)
        return tuple(sorted({page for first, last in spans for page in range(first, last + 1)}))


def range_pages(sizes: Sequence[int], *, page_bytes: int) -> int:
    """Pages of a range that holds matrices of `sizes` bytes, wherever in the pool it starts."""
    return -(-(sum(map(_aligned, sizes)) + ALIGNMENT) // page_bytes)


def place(sizes: Sequence[int], *, order: Sequence[int], first_page: int, page_bytes: int) -> MergeRange:
    """Lay the matrices side by side in `order` from `first_page` on."""
    begin = _aligned(first_page * page_bytes)
    ends = accumulate((_aligned(sizes[at]) for at in order), initial=begin)
    starts = dict(zip(order, ends, strict=False))
    return MergeRange(tuple(starts[at] for at in range(len(sizes))), tuple(sizes), page_bytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
