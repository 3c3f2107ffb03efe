"""Shrink: t[token, target, split, r] = sum over the split's columns of x[token] * A[r], f32, without the scale.

Two kernels by how a row came here. Decode rows (`shrink_row`) gather their own adapter, split over the columns of A so that
few rows fill a GPU; each split keeps its own sum and `expand` adds them in order: no atomics. Prefill rows
(`shrink_chunk`) go through the tensor cores, a chunk of one slot's tokens at a time, one split.

Splits and blocks depend on the layer's shape and the runtime's max_rank alone, so a row's sum has one order of additions
whatever its batch. Floor of a decode row: its adapter's A bytes, once (rank 16, 4096 columns, bf16: 128 KiB a target).
Sources: S-LoRA (arXiv 2311.03285) section 5.2 for the gather over pages, Punica (arXiv 2310.18547) for the segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_runtime.kernels.gpu.rows import load_rows, row_starts, site_of

BLOCK_K = 256  # columns of a decode row's tile
CHUNK_K = 64  # columns of a chunk's tile
COLUMNS_PER_SPLIT = 1024
MAX_SPLITS = 8
_PART_A = tl.constexpr(0)


def num_splits(num_columns: int) -> int:
    """Splits of a decode row's columns: of the layer's shape alone."""
    return min(MAX_SPLITS, -(-num_columns // COLUMNS_PER_SPLIT))


def columns_per_split(num_columns: int) -> int:
    """A multiple of BLOCK_K, so that no tile belongs to two splits."""
    return -(-num_columns // (num_splits(num_columns) * BLOCK_K)) * BLOCK_K


@triton.jit(do_not_specialize=["layer"])
def shrink_row(  # type: ignore[no-untyped-def]
    t,
    x,
    pool,
    rows,
    ranks,
    dtypes,
    slots,
    tokens,
    layer,
    num_layers,
    max_rank,
    num_columns,
    split_columns,
    FIRST_TARGET: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (decode row, target, split). Rows of adapters stored otherwise than CODE are another launch's."""
    token = tl.load(tokens + tl.program_id(0)).to(tl.int64)
    slot = tl.load(slots + token)
    if tl.load(dtypes + slot) != CODE:
        return
    site = site_of(slot, layer, FIRST_TARGET + tl.program_id(1), num_layers)
    rank = tl.load(ranks + site)
    split, splits = tl.program_id(2), tl.num_programs(2)
    first = split * split_columns
    end = tl.minimum(first + split_columns, num_columns)
    out = t + ((token * tl.num_programs(1) + tl.program_id(1)) * splits + split) * max_rank
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        starts = row_starts(rows, site, _PART_A, r, rank, max_rank)
        sums = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        for k0 in range(first, end, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            value = tl.load(x + token * num_columns + k, mask=k < num_columns, other=0.0).to(tl.float32)
            sums += load_rows(pool, starts, r, rank, k, num_columns, CODE).to(tl.float32) * value[None, :]
        tl.store(out + r, tl.sum(sums, axis=1), mask=r < rank)


@triton.jit(do_not_specialize=["layer"])
def shrink_chunk(  # type: ignore[no-untyped-def]
    t,
    x,
    pool,
    rows,
    ranks,
    dtypes,
    chunks,
    layer,
    num_layers,
    max_rank,
    num_columns,
    num_splits,
    FIRST_TARGET: tl.constexpr,
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (chunk, target): up to BLOCK_M tokens side by side that share a slot. Their whole sum is in the first split."""
    chunk = chunks + tl.program_id(0) * 3
    start, count, slot = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    if tl.load(dtypes + slot) != CODE:
        return
    site = site_of(slot, layer, FIRST_TARGET + tl.program_id(1), num_layers)
    rank = tl.load(ranks + site)
    m = tl.arange(0, BLOCK_M)
    token = (start + m).to(tl.int64)
    out = t + (token * tl.num_programs(1) + tl.program_id(1)) * num_splits * max_rank
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        starts = row_starts(rows, site, _PART_A, r, rank, max_rank)
        sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k0 in range(0, num_columns, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            wanted = (m < count)[:, None] & (k < num_columns)[None, :]
            value = tl.load(x + token[:, None] * num_columns + k[None, :], mask=wanted, other=0.0)
            weight = load_rows(pool, starts, r, rank, k, num_columns, CODE)
            if PRECISION == "native":  # both operands have one 16-bit type
                sums = tl.dot(value, tl.trans(weight), sums)
            else:
                sums = tl.dot(value.to(tl.float32), tl.trans(weight.to(tl.float32)), sums, input_precision=PRECISION)
        wanted = (m < count)[:, None] & (r < rank)[None, :]
        tl.store(out[:, None] + r[None, :], sums, mask=wanted)
