"""RMSNorm of each head of q and k (where there are weights), their rotary embedding, and the write of K and V into the pool.

Each value is read once, written once. Semantics (halves convention): (low, high) -> (low * cos - high * sin,
high * cos + low * sin) at the token's position; then kv[page, layer, 0 | 1, head, offset] = k, v. q is rotated in place; k
only on its way to the pool.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUM_WARPS = 1  # half a head has 32 to 64 values: more threads would load one each


@triton.jit
def _weight(q_norm, k_norm, i, inside, is_query):  # type: ignore[no-untyped-def]
    return tl.load(q_norm + i, mask=inside & is_query, other=0.0) + tl.load(k_norm + i, mask=inside & (is_query == 0), other=0.0)


@triton.jit
def rope_kv_write(  # type: ignore[no-untyped-def]
    qkv,
    kv,
    cos,
    sin,
    positions,
    kv_slots,
    q_norm,
    k_norm,
    eps,
    num_heads,
    num_kv_heads,
    head_dim,
    tokens_per_page,
    page_stride,
    layer_offset,
    value_offset,
    head_stride,
    HAS_NORMS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One (token, head of q, k or v)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_H)
    half = head_dim // 2
    inside = i < half
    at = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * head_dim
    low = tl.load(at + i, mask=inside, other=0.0)
    high = tl.load(at + half + i, mask=inside, other=0.0)
    kv_slot = tl.load(kv_slots + token)
    page, offset = kv_slot // tokens_per_page, kv_slot % tokens_per_page
    block = kv + page * page_stride + layer_offset + offset * head_dim
    if head < num_heads + num_kv_heads:
        turn = tl.load(positions + token) * half + i
        c = tl.load(cos + turn, mask=inside, other=0.0)
        s = tl.load(sin + turn, mask=inside, other=0.0)
        low_f, high_f = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORMS:
            size = tl.rsqrt((tl.sum(low_f * low_f, axis=0) + tl.sum(high_f * high_f, axis=0)) / head_dim + eps)
            low_f *= size * _weight(q_norm, k_norm, i, inside, head < num_heads)
            high_f *= size * _weight(q_norm, k_norm, half + i, inside, head < num_heads)
        turned_low, turned_high = low_f * c - high_f * s, high_f * c + low_f * s
        if head < num_heads:
            tl.store(at + i, turned_low.to(qkv.dtype.element_ty), mask=inside)
            tl.store(at + half + i, turned_high.to(qkv.dtype.element_ty), mask=inside)
        else:
            to = block + (head - num_heads) * head_stride
            tl.store(to + i, turned_low.to(kv.dtype.element_ty), mask=inside)
            tl.store(to + half + i, turned_high.to(kv.dtype.element_ty), mask=inside)
    else:
        to = block + value_offset + (head - num_heads - num_kv_heads) * head_stride
        tl.store(to + i, low.to(kv.dtype.element_ty), mask=inside)
        tl.store(to + half + i, high.to(kv.dtype.element_ty), mask=inside)
