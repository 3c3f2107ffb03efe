"""Merge: out[o, d] = W[o, d] + sum over r of (scale * B[r, o]) * A[r, d], one target of a stacked matrix at a time.

The base weight is read and the sum written once each; A and B come straight from the page pool, widened to f32. A target
that the adapter leaves alone is copied, so that every element of `out` is written. Floor: W's bytes twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_runtime.kernels.gpu.expand import span_of
from gpu_runtime.kernels.gpu.rows import load_rows, row_starts, site_of

BLOCK_O = 64
BLOCK_D = 64
_PART_A = tl.constexpr(0)
_PART_B = tl.constexpr(1)


@triton.jit(do_not_specialize=["slot", "layer"])
def merge(  # type: ignore[no-untyped-def]
    out,
    weight,
    pool,
    rows,
    ranks,
    scales,
    slot,
    layer,
    num_layers,
    max_rank,
    num_columns,
    FIRST_TARGET: tl.constexpr,
    S0: tl.constexpr,
    E0: tl.constexpr,
    S1: tl.constexpr,
    E1: tl.constexpr,
    S2: tl.constexpr,
    E2: tl.constexpr,
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One (block of rows of a target, block of columns, target)."""
    which = tl.program_id(2)
    start, end = span_of(which, S0, E0, S1, E1, S2, E2)
    if tl.program_id(0) * BLOCK_O >= end - start:
        return
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    site = site_of(slot, layer, FIRST_TARGET + which, num_layers)
    rank, scale = tl.load(ranks + site), tl.load(scales + site)
    sums = tl.zeros((BLOCK_O, BLOCK_D), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        a = load_rows(pool, row_starts(rows, site, _PART_A, r, rank, max_rank), r, rank, d, num_columns, CODE).to(tl.float32)
        b = load_rows(pool, row_starts(rows, site, _PART_B, r, rank, max_rank), r, rank, o, end - start, CODE).to(tl.float32)
        sums = tl.dot(tl.trans(b * scale), a, sums, input_precision=PRECISION)
    at = (start + o).to(tl.int64)[:, None] * num_columns + d[None, :]
    inside = (o < end - start)[:, None] & (d < num_columns)[None, :]
    base = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (base + sums).to(out.dtype.element_ty), mask=inside)
