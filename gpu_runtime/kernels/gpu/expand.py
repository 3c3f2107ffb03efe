"""Expand: y[token, span] += (scale * sum over splits of t[token, target, split]) @ B, in place.

The splits of `shrink` are added in their order and the scale is applied in f32 to the rank vector, never to stored B. B lies
rank-major in the pool, (rank, out), so a tile of it is contiguous along y. Decode rows (`expand_row`) gather their own
adapter; prefill rows (`expand_chunk`) share one chunk's tile on the tensor cores: f32 t against 16-bit B as three tf32
products, which keeps t's bits. Floor of a decode row: its adapter's B bytes once, y twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_runtime.kernels.gpu.rows import load_rows, row_starts, site_of

BLOCK_O = 256  # columns of y of a decode row's tile
CHUNK_O = 64  # of a chunk's tile
_PART_B = tl.constexpr(1)


@triton.jit
def span_of(which, S0: tl.constexpr, E0: tl.constexpr, S1: tl.constexpr, E1: tl.constexpr, S2: tl.constexpr, E2: tl.constexpr):  # type: ignore[no-untyped-def]
    """[start, end) of the columns of y that target `which` adds to."""
    start = tl.where(which == 0, S0, tl.where(which == 1, S1, S2))
    end = tl.where(which == 0, E0, tl.where(which == 1, E1, E2))
    return start, end


@triton.jit(do_not_specialize=["layer"])
def expand_row(  # type: ignore[no-untyped-def]
    y,
    t,
    pool,
    rows,
    ranks,
    scales,
    dtypes,
    slots,
    tokens,
    layer,
    num_layers,
    max_rank,
    y_stride,
    num_splits,
    FIRST_TARGET: tl.constexpr,
    S0: tl.constexpr,
    E0: tl.constexpr,
    S1: tl.constexpr,
    E1: tl.constexpr,
    S2: tl.constexpr,
    E2: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One (decode row, block of columns, target). A target that the adapter leaves alone (rank 0) is not written at all."""
    token = tl.load(tokens + tl.program_id(0)).to(tl.int64)
    slot = tl.load(slots + token)
    if tl.load(dtypes + slot) != CODE:
        return
    which = tl.program_id(2)
    start, end = span_of(which, S0, E0, S1, E1, S2, E2)
    if tl.program_id(1) * BLOCK_O >= end - start:
        return
    site = site_of(slot, layer, FIRST_TARGET + which, num_layers)
    rank = tl.load(ranks + site)
    if rank == 0:
        return
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    parts = t + (token * tl.num_programs(2) + which) * num_splits * max_rank
    scale = tl.load(scales + site)
    sums = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        value = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for split in range(num_splits):
            value += tl.load(parts + split * max_rank + r, mask=r < rank, other=0.0)
        starts = row_starts(rows, site, _PART_B, r, rank, max_rank)
        weight = load_rows(pool, starts, r, rank, column, end - start, CODE).to(tl.float32)
        sums += tl.sum((value * scale)[:, None] * weight, axis=0)
    at = y + token * y_stride + start + column
    inside = column < end - start
    tl.store(at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + sums).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer"])
def expand_chunk(  # type: ignore[no-untyped-def]
    y,
    t,
    pool,
    rows,
    ranks,
    scales,
    dtypes,
    chunks,
    layer,
    num_layers,
    max_rank,
    y_stride,
    num_splits,
    FIRST_TARGET: tl.constexpr,
    S0: tl.constexpr,
    E0: tl.constexpr,
    S1: tl.constexpr,
    E1: tl.constexpr,
    S2: tl.constexpr,
    E2: tl.constexpr,
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One (chunk, block of columns, target). Chunks have one split: the first holds the whole sum."""
    chunk = chunks + tl.program_id(0) * 3
    start_token, count, slot = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    if tl.load(dtypes + slot) != CODE:
        return
    which = tl.program_id(2)
    start, end = span_of(which, S0, E0, S1, E1, S2, E2)
    if tl.program_id(1) * BLOCK_O >= end - start:
        return
    site = site_of(slot, layer, FIRST_TARGET + which, num_layers)
    rank = tl.load(ranks + site)
    if rank == 0:
        return
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.arange(0, BLOCK_M)
    token = (start_token + m).to(tl.int64)
    parts = t + (token * tl.num_programs(2) + which) * num_splits * max_rank
    scale = tl.load(scales + site)
    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        wanted = (m < count)[:, None] & (r < rank)[None, :]
        value = tl.load(parts[:, None] + r[None, :], mask=wanted, other=0.0) * scale
        starts = row_starts(rows, site, _PART_B, r, rank, max_rank)
        weight = load_rows(pool, starts, r, rank, column, end - start, CODE).to(tl.float32)
        sums = tl.dot(value, weight, sums, input_precision=PRECISION)
    at = y + token[:, None] * y_stride + start + column[None, :]
    inside = (m < count)[:, None] & (column < end - start)[None, :]
    tl.store(at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + sums).to(y.dtype.element_ty), mask=inside)
