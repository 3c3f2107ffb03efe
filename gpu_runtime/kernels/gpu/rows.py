"""Reads of rank rows straight from the page pool: what shrink and expand share."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_runtime.core import F16, F32

# What a kernel may close over: Triton takes globals only as constants.
_F32, _F16 = tl.constexpr(F32), tl.constexpr(F16)
UNIT_BYTES = tl.constexpr(16)  # slot tables count in these
NUM_TARGETS = tl.constexpr(7)


@triton.jit
def site_of(slot, layer, target, num_layers):  # type: ignore[no-untyped-def]
    """Index of (slot, layer, target) in `ranks` and `scales`; times 2 * max_rank it is the site's first entry of `rows`."""
    return (slot * num_layers + layer) * NUM_TARGETS + target


@triton.jit
def row_starts(rows, site, part, rank_index, rank, max_rank):  # type: ignore[no-untyped-def]
    """Byte offsets of rank rows in the pool, int64: int32 units of 16 bytes reach 32 GiB, their product does not fit int32."""
    units = tl.load(rows + (site * 2 + part) * max_rank + rank_index, mask=rank_index < rank, other=0)
    return units.to(tl.int64) * UNIT_BYTES


@triton.jit
def load_rows(pool, starts, rank_index, rank, columns, num_columns, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile (R, C) of rank rows as stored. Loads are masked by true rank and width: what lies beyond is never read."""
    wanted = (rank_index < rank)[:, None] & (columns < num_columns)[None, :]
    if CODE == _F32:
        at = (pool + starts).to(tl.pointer_type(tl.float32))
    elif CODE == _F16:
        at = (pool + starts).to(tl.pointer_type(tl.float16))
    else:
        at = (pool + starts).to(tl.pointer_type(tl.bfloat16))
    return tl.load(at[:, None] + columns[None, :], mask=wanted, other=0.0)
