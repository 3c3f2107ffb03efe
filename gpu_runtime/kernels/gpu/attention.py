"""Paged attention: out[t, h] = softmax(scale * q[t, h] . K[first..position]) @ V[first..position], causal, GQA.

`first` is 0, or position + 1 - window where the layer has one; blocks and splits that lie before it are passed by.

Decode (`attend_split`, `join_splits`): all query heads of one KV head share its blocks; a request's context is cut every
SPLIT_TOKENS tokens, each split keeps (max, sum, weighted V), and the splits are joined in order. Where a context is cut
depends on its own length alone. Prefill (`attend_prompt`): a block of one head's queries walks the context from token 0 on
in steps of BLOCK_N, whatever was cut into chunks before, and steps beyond a row's position leave its sums as they are.

K and V are masked when they are loaded: pages hold old bytes of others. Floor of a decode row: its K and V once
(128 KiB a 1k tokens of one 8-head bf16 layer); flash decoding (Dao et al., 2023) is the source of the split.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPLIT_TOKENS = 256
BLOCK_N = 32  # tokens of context a step
BLOCK_M = 32  # queries of a prompt's block
PROMPT_WARPS = 4
SPLIT_WARPS = 2  # a split's tiles are small: with four warps most of them would idle or spill
MIN_GROUP = 16  # rows that a tensor core takes at least


@triton.jit
def _context_at(kv, table, n, length, d, head_dim, page_stride, tokens_per_page):  # type: ignore[no-untyped-def]
    """Tile (N, D) of K or V at context positions n; `kv` points at the layer's part and head. Nothing beyond `length` is read."""
    page = tl.load(table + n // tokens_per_page, mask=n < length, other=0).to(tl.int64)
    at = kv + page * page_stride + (n % tokens_per_page) * head_dim
    return tl.load(at[:, None] + d[None, :], mask=(n < length)[:, None] & (d < head_dim)[None, :], other=0.0)


@triton.jit
def _first_seen(end, window):  # type: ignore[no-untyped-def]
    """The first place that a query at `end` - 1 sees."""
    return tl.where(window > 0, tl.maximum(end - window, 0), 0)


@triton.jit
def _absorb(q, k, v, seen, best, total, summed, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of the online softmax: scores of `seen` places only; the running (max, sum, weighted V) of each row."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    keep = tl.exp(best - anchor)
    weights = tl.where(seen, tl.exp(scores - anchor[:, None]), 0.0)
    total = total * keep + tl.sum(weights, axis=1)
    summed = summed * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return higher, total, summed


@triton.jit
def attend_split(  # type: ignore[no-untyped-def]
    parts,
    bests,
    totals,
    qkv,
    kv,
    block_tables,
    context_lens,
    query_starts,
    requests,
    scale,
    table_stride,
    qkv_stride,
    page_stride,
    layer_offset,
    value_offset,
    head_stride,
    tokens_per_page,
    head_dim,
    group,
    window,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (decode row, KV head, split) -> its part of the sums. Splits outside the row's own window of context do nothing."""
    at, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(requests + at)
    length = tl.load(context_lens + request)
    first, oldest = split * SPLIT_TOKENS, _first_seen(length, window)
    if first >= length or first + SPLIT_TOKENS <= oldest:
        return
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    token = tl.load(query_starts + request).to(tl.int64)
    real = (g < group)[:, None] & (d < head_dim)[None, :]
    heads = head * group + g
    q = tl.load(qkv + token * qkv_stride + heads[:, None] * head_dim + d[None, :], mask=real, other=0.0)
    keys = kv + layer_offset + head * head_stride
    table = block_tables + request * table_stride
    best = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    summed = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    for n0 in range(tl.maximum(first, oldest // BLOCK_N * BLOCK_N), tl.minimum(first + SPLIT_TOKENS, length), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _context_at(keys, table, n, length, d, head_dim, page_stride, tokens_per_page)
        v = _context_at(keys + value_offset, table, n, length, d, head_dim, page_stride, tokens_per_page)
        seen = ((n >= oldest) & (n < length))[None, :] & (g < group)[:, None]
        best, total, summed = _absorb(q, k.to(q.dtype), v.to(q.dtype), seen, best, total, summed, scale, PRECISION)
    row = ((at * tl.num_programs(1) + head) * tl.num_programs(2) + split) * group + g
    tl.store(bests + row, best, mask=g < group)
    tl.store(totals + row, total, mask=g < group)
    tl.store(parts + row[:, None] * head_dim + d[None, :], summed, mask=real)


@triton.jit
def join_splits(  # type: ignore[no-untyped-def]
    out,
    parts,
    bests,
    totals,
    context_lens,
    query_starts,
    requests,
    num_splits,
    head_dim,
    group,
    window,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One (decode row, query head): the splits of its own context, in order."""
    at, query_head = tl.program_id(0), tl.program_id(1)
    request = tl.load(requests + at)
    d = tl.arange(0, BLOCK_D)
    length = tl.load(context_lens + request)
    first = _first_seen(length, window) // SPLIT_TOKENS
    row = ((at * (tl.num_programs(1) // group) + query_head // group) * num_splits + first) * group + query_head % group
    best = tl.load(bests + row)
    total = tl.load(totals + row)
    summed = tl.load(parts + row * head_dim + d, mask=d < head_dim, other=0.0)
    for split in range(1, tl.cdiv(length, SPLIT_TOKENS) - first):
        other = row + split * group
        other_best = tl.load(bests + other)
        higher = tl.maximum(best, other_best)
        mine, theirs = tl.exp(best - higher), tl.exp(other_best - higher)
        total = total * mine + tl.load(totals + other) * theirs
        summed = summed * mine + tl.load(parts + other * head_dim + d, mask=d < head_dim, other=0.0) * theirs
        best = higher
    token = tl.load(query_starts + request).to(tl.int64)
    to = out + (token * tl.num_programs(1) + query_head) * head_dim + d
    tl.store(to, (summed / total).to(out.dtype.element_ty), mask=d < head_dim)


@triton.jit
def attend_prompt(  # type: ignore[no-untyped-def]
    out,
    qkv,
    kv,
    block_tables,
    context_lens,
    query_starts,
    blocks,
    scale,
    table_stride,
    qkv_stride,
    page_stride,
    layer_offset,
    value_offset,
    head_stride,
    tokens_per_page,
    head_dim,
    group,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (block of a prompt's queries, query head). `blocks` holds (request, index of its first query) pairs."""
    request, first = tl.load(blocks + tl.program_id(0) * 2), tl.load(blocks + tl.program_id(0) * 2 + 1)
    query_head = tl.program_id(1)
    start, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    length = tl.load(context_lens + request)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token = (start + first + m).to(tl.int64)
    position = length - (end - start) + first + m
    real = (token < end)[:, None] & (d < head_dim)[None, :]
    q = tl.load(qkv + token[:, None] * qkv_stride + query_head * head_dim + d[None, :], mask=real, other=0.0)
    keys = kv + layer_offset + (query_head // group) * head_stride
    table = block_tables + request * table_stride
    best = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    summed = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    last = tl.minimum(length, length - (end - start) + first + BLOCK_M)
    oldest = _first_seen(position + 1, window)
    for n0 in range(_first_seen(length - (end - start) + first + 1, window) // BLOCK_N * BLOCK_N, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _context_at(keys, table, n, last, d, head_dim, page_stride, tokens_per_page)
        v = _context_at(keys + value_offset, table, n, last, d, head_dim, page_stride, tokens_per_page)
        seen = (n[None, :] <= position[:, None]) & (n[None, :] >= oldest[:, None]) & (token < end)[:, None]
        best, total, summed = _absorb(q, k.to(q.dtype), v.to(q.dtype), seen, best, total, summed, scale, PRECISION)
    to = out + (token[:, None] * tl.num_programs(1) + query_head) * head_dim + d[None, :]
    total = tl.where(token < end, total, 1.0)  # rows past the prompt's end saw nothing
    tl.store(to, (summed / total[:, None]).to(out.dtype.element_ty), mask=real)
