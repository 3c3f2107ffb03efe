"""Rotary embedding with the write of K and V, and paged attention.

Semantics: norm each head of q and k (where there are weights), rotate them by position, store k and v in the token's page; then
out[t, h] = softmax(scale * q[t, h] . K[f..t]) @ V[f..t], causal, from the window's first token on, queries of one KV head together.

An item is (token, KV head), and a token's sums run over its own context in order. Only tokens f to `position` are
loaded, so what a page held before never counts. Floor: 2 * kv_heads * head_dim * 4 bytes a context token a layer
(SmolLM2: 46 KB a context token over all layers; 16 requests of 256 tokens: 189 MB, about 8 ms).
"""

from __future__ import annotations

import math

import numpy as np

from gpu_runtime.core import F32
from gpu_runtime.kernels.cpu.compiled import inlined
from gpu_runtime.kernels.cpu.elementwise import exp
from gpu_runtime.kernels.cpu.sync import claim, finish, wait
from gpu_runtime.kernels.cpu.vectors import make_combine, make_dots, prefetch

_dots14, _dots24, _dots34, _dots44 = (make_dots(heads, 4, F32) for heads in (1, 2, 3, 4))
_dots11, _dots21, _dots31, _dots41 = (make_dots(heads, 1, F32) for heads in (1, 2, 3, 4))
_join14, _join24, _join34, _join44 = (make_combine(heads, 4, F32) for heads in (1, 2, 3, 4))
_join11, _join21, _join31, _join41 = (make_combine(heads, 1, F32) for heads in (1, 2, 3, 4))


@inlined
def _rotate(row, start, half, cos, sin):  # type: ignore[no-untyped-def]
    for at in range(half):
        low, high = row[start + at], row[start + half + at]
        row[start + at] = low * cos[at] - high * sin[at]
        row[start + half + at] = high * cos[at] + low * sin[at]


@inlined
def _norm_head(row, start, weight, eps):  # type: ignore[no-untyped-def]
    width = weight.shape[0]
    total = np.float32(0)
    for at in range(width):
        total += row[start + at] * row[start + at]
    factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(width) + eps))
    for at in range(width):
        row[start + at] = row[start + at] * factor * weight[at]


@inlined
def _norm_heads(row, num_heads, kv_heads, q_norm, k_norm, eps):  # type: ignore[no-untyped-def]
    head_dim = q_norm.shape[0]
    for head in range(num_heads):
        _norm_head(row, head * head_dim, q_norm, eps)
    for head in range(num_heads, num_heads + kv_heads):
        _norm_head(row, head * head_dim, k_norm, eps)


@inlined
def rope_kv_write(sync, phase, qkv, num_heads, cos, sin, kv, layer, positions, kv_slots, q_norm, k_norm, eps):  # type: ignore[no-untyped-def]
    """qkv (T, (H + 2 KV) * head_dim), rotated in place; kv (P, L, 2, KV, tokens_per_page, head_dim); norms (head_dim), or (0) for none."""
    num_tokens = qkv.shape[0]
    kv_heads, tokens_per_page, head_dim = kv.shape[3], kv.shape[4], kv.shape[5]
    while True:
        token = claim(sync, phase, 1)
        if token >= num_tokens:
            break
        row, position = qkv[token], positions[token]
        if q_norm.shape[0] > 0:
            _norm_heads(row, num_heads, kv_heads, q_norm, k_norm, eps)
        for head in range(num_heads + kv_heads):
            _rotate(row, head * head_dim, head_dim // 2, cos[position], sin[position])
        page, offset = kv_slots[token] // tokens_per_page, kv_slots[token] % tokens_per_page
        for head in range(kv_heads):
            k, v = (num_heads + head) * head_dim, (num_heads + kv_heads + head) * head_dim
            for at in range(head_dim):
                kv[page, layer, 0, head, offset, at] = row[k + at]
                kv[page, layer, 1, head, offset, at] = row[v + at]
        finish(sync, phase, 1)
    wait(sync, phase, num_tokens)


@inlined
def _score(heads, q, stride, depth, out, outs, keys, count):  # type: ignore[no-untyped-def]
    """out[h, c] = q[h] . keys[c] for up to four heads and `count` keys of one page."""
    at = 0
    while at + 4 <= count:
        key, to = keys + at * stride, out + 4 * at
        row1, row2, row3 = key + stride, key + 2 * stride, key + 3 * stride
        if heads == 4:
            _dots44(q, stride, depth, to, outs, key, row1, row2, row3)
        elif heads == 3:
            _dots34(q, stride, depth, to, outs, key, row1, row2, row3)
        elif heads == 2:
            _dots24(q, stride, depth, to, outs, key, row1, row2, row3)
        else:
            _dots14(q, stride, depth, to, outs, key, row1, row2, row3)
        at += 4
    while at < count:
        key, to = keys + at * stride, out + 4 * at
        if heads == 4:
            _dots41(q, stride, depth, to, outs, key)
        elif heads == 3:
            _dots31(q, stride, depth, to, outs, key)
        elif heads == 2:
            _dots21(q, stride, depth, to, outs, key)
        else:
            _dots11(q, stride, depth, to, outs, key)
        at += 1


@inlined
def _weigh(heads, out, stride, depth, weights, ws, values, count):  # type: ignore[no-untyped-def]
    """out[h] += sum_c weights[h, c] * values[c] for up to four heads and `count` values of one page, in order of c."""
    at = 0
    while at + 4 <= count:
        row, w = values + at * stride, weights + 4 * at
        row1, row2, row3 = row + stride, row + 2 * stride, row + 3 * stride
        if heads == 4:
            _join44(out, stride, depth, w, ws, row, row1, row2, row3)
        elif heads == 3:
            _join34(out, stride, depth, w, ws, row, row1, row2, row3)
        elif heads == 2:
            _join24(out, stride, depth, w, ws, row, row1, row2, row3)
        else:
            _join14(out, stride, depth, w, ws, row, row1, row2, row3)
        at += 4
    while at < count:
        row, w = values + at * stride, weights + 4 * at
        if heads == 4:
            _join41(out, stride, depth, w, ws, row)
        elif heads == 3:
            _join31(out, stride, depth, w, ws, row)
        elif heads == 2:
            _join21(out, stride, depth, w, ws, row)
        else:
            _join11(out, stride, depth, w, ws, row)
        at += 1


@inlined
def _softmax(scores, start, length, scale):  # type: ignore[no-untyped-def]
    """In place over scores[start : start + length] * scale."""
    peak = scores[start]
    for at in range(start + 1, start + length):
        peak = max(peak, scores[at])
    for at in range(start, start + length):
        scores[at] = exp((scores[at] - peak) * scale)
    total = np.float32(0)
    for at in range(start, start + length):
        total += scores[at]
    factor = np.float32(1) / total
    for at in range(start, start + length):
        scores[at] *= factor


@inlined
def _announce(address, num_bytes):  # type: ignore[no-untyped-def]
    """Prefetch a block that is needed next: blocks lie a page apart, where the hardware does not look ahead."""
    for at in range(0, num_bytes, 64):
        prefetch(address + at)


@inlined
def _attend(kv, layer, kv_head, table, first, length, q, heads, out, scale, scratch):  # type: ignore[no-untyped-def]
    """Up to four query heads at address `q` over tokens [first, length) of `table`, into address `out`."""
    tokens_per_page, depth = kv.shape[4], kv.shape[5]
    block_bytes = tokens_per_page * depth * 4
    page_bytes = kv.shape[1] * 2 * kv.shape[3] * block_bytes
    keys = kv.ctypes.data + (layer * 2 * kv.shape[3] + kv_head) * block_bytes
    values = keys + kv.shape[3] * block_bytes
    scores, span = scratch.ctypes.data, length - first
    first_page, num_pages = first // tokens_per_page, (length + tokens_per_page - 1) // tokens_per_page
    for at in range(first_page, num_pages):
        start = max(first, at * tokens_per_page)
        count = min((at + 1) * tokens_per_page, length) - start
        following = keys + table[at + 1] * page_bytes if at + 1 < num_pages else values + table[first_page] * page_bytes
        _announce(following, block_bytes)
        block = keys + table[at] * page_bytes + (start - at * tokens_per_page) * depth * 4
        _score(heads, q, depth * 4, depth, scores + (start - first) * 4, span * 4, block, count)
    for head in range(heads):
        _softmax(scratch, head * span, span, scale)
    for at in range(first_page, num_pages):
        start = max(first, at * tokens_per_page)
        count = min((at + 1) * tokens_per_page, length) - start
        if at + 1 < num_pages:
            _announce(values + table[at + 1] * page_bytes, block_bytes)
        block = values + table[at] * page_bytes + (start - at * tokens_per_page) * depth * 4
        _weigh(heads, out, depth * 4, depth, scores + (start - first) * 4, span * 4, block, count)


@inlined
def paged_attention(sync, phase, qkv, num_heads, kv, layer, positions, owners, tables, out, scale, window, scratch):  # type: ignore[no-untyped-def]
    """owners int32 (T) = request of each token, tables int32 (R, M), out (T, H * head_dim), scratch 4 * longest context."""
    num_tokens = qkv.shape[0]
    kv_heads, depth = kv.shape[3], kv.shape[5]
    group, num_items = num_heads // kv_heads, num_tokens * kv_heads
    while True:
        item = claim(sync, phase, 1)
        if item >= num_items:
            break
        token, kv_head = item // kv_heads, item % kv_heads
        head0, length = kv_head * group, positions[token] + 1
        first = max(0, length - window) if window > 0 else 0
        out[token, head0 * depth : (head0 + group) * depth] = np.float32(0)
        for done in range(0, group, 4):
            head = head0 + done
            q = qkv.ctypes.data + (token * qkv.shape[1] + head * depth) * 4
            to = out.ctypes.data + (token * out.shape[1] + head * depth) * 4
            _attend(kv, layer, kv_head, tables[owners[token]], first, length, q, min(4, group - done), to, scale, scratch)
        finish(sync, phase, 1)
    wait(sync, phase, num_items)
