"""The base GEMM over packed weights.

Semantics: y[t, o] = sum_d x[t, d] * W[o, d] + bias[o].

W is packed into panels of PANEL output features, (panels, D, PANEL), so that one panel is one sequential stream of memory
and every token needs only broadcasts of x. Floor, SmolLM2-135M fp32: 425 MB for the layers and 113 MB for the head a step
(15 to 22 ms at 25 to 37 GB/s), and 2 * 135e6 FLOPs a token. Two AVX-512 vCPUs of a shared machine reach 112 GFLOP/s, so
16 tokens take 38 ms of arithmetic: from about 8 tokens on a step is bound by arithmetic, below by memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gpu_runtime.kernels.cpu.compiled import inlined
from gpu_runtime.kernels.cpu.sync import claim, finish, wait
from gpu_runtime.kernels.cpu.vectors import PANEL, TILE_TOKENS, make_tile
from gpu_runtime.kernels.rows import Factors

TOKEN_BLOCK = 64  # tokens that a panel meets while it lies in the L2 cache

_tile8, _tile6, _tile4, _tile2, _tile1 = (make_tile(tokens) for tokens in (8, 6, 4, 2, 1))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """(O, D) -> (ceil(O / PANEL), D, PANEL) f32, the last panel padded with zeros."""
    num_out, depth = weight.shape
    panels = -(-num_out // PANEL)
    packed = torch.zeros((panels, depth, PANEL), dtype=torch.float32)
    whole = num_out // PANEL
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, depth).transpose(1, 2)
    if whole < panels:
        packed[whole, :, : num_out - whole * PANEL] = weight[whole * PANEL :].T
    return packed


def merge(out: torch.Tensor, *, weight: torch.Tensor, factors: Iterable[Factors]) -> None:
    """See `backend.Kernels.merge`; both packed. A panel that a target shares with another one gets zeros beyond its columns."""
    out.copy_(weight)
    for one in factors:
        rank, depth = one.a.shape
        first, last = one.start // PANEL, -(-one.end // PANEL)
        columns = torch.zeros((rank, (last - first) * PANEL))
        columns[:, one.start - first * PANEL : one.end - first * PANEL] = one.b
        panels = columns.view(rank, last - first, PANEL).transpose(0, 1)
        out[first:last].baddbmm_(one.a.T.expand(last - first, depth, rank), panels)


@inlined
def _run_tiles(weights, x, x_stride, depth, y, y_stride, num_tokens):  # type: ignore[no-untyped-def]
    """One panel against `num_tokens` tokens, in the widest tiles that fit."""
    done = 0
    while num_tokens - done >= TILE_TOKENS:
        if TILE_TOKENS == 8:
            _tile8(weights, x + done * x_stride, x_stride, depth, y + done * y_stride, y_stride)
        else:
            _tile6(weights, x + done * x_stride, x_stride, depth, y + done * y_stride, y_stride)
        done += TILE_TOKENS
    if num_tokens - done >= 4:
        _tile4(weights, x + done * x_stride, x_stride, depth, y + done * y_stride, y_stride)
        done += 4
    if num_tokens - done >= 2:
        _tile2(weights, x + done * x_stride, x_stride, depth, y + done * y_stride, y_stride)
        done += 2
    if num_tokens - done == 1:
        _tile1(weights, x + done * x_stride, x_stride, depth, y + done * y_stride, y_stride)


@inlined
def _partial_panel(weights, x, first, last, y, column, scratch):  # type: ignore[no-untyped-def]
    """The last panel where O is not a multiple of PANEL: through `scratch` (TOKEN_BLOCK * PANEL), as tiles write whole panels."""
    depth = x.shape[1]
    _run_tiles(weights, x.ctypes.data + first * depth * 4, depth * 4, depth, scratch.ctypes.data, PANEL * 4, last - first)
    for token in range(first, last):
        for at in range(y.shape[1] - column):
            y[token, column + at] = scratch[(token - first) * PANEL + at]


@inlined
def _add_bias(y, first, last, column, bias):  # type: ignore[no-untyped-def]
    end = min(column + PANEL, bias.shape[0])
    for token in range(first, last):
        for at in range(column, end):
            y[token, at] += bias[at]


@inlined
def linear(sync, phase, packed, bias, x, y, scratch):  # type: ignore[no-untyped-def]
    """packed the address of (panels, D, PANEL), bias (O) or (0) for none, x (T, D), y (T, O).

    An item is one panel against up to TOKEN_BLOCK tokens.
    """
    num_tokens, num_out = y.shape
    num_panels, depth = (num_out + PANEL - 1) // PANEL, x.shape[1]
    num_items = num_panels * ((num_tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK)
    while True:
        item = claim(sync, phase, 1)
        if item >= num_items:
            break
        block, panel = item // num_panels, item % num_panels
        first = block * TOKEN_BLOCK
        last = min(first + TOKEN_BLOCK, num_tokens)
        weights = packed + panel * depth * PANEL * 4
        column = panel * PANEL
        if column + PANEL <= num_out:
            target = y.ctypes.data + (first * num_out + column) * 4
            _run_tiles(weights, x.ctypes.data + first * depth * 4, depth * 4, depth, target, num_out * 4, last - first)
        else:
            _partial_panel(weights, x, first, last, y, column, scratch)
        if bias.shape[0] > 0:
            _add_bias(y, first, last, column, bias)
        finish(sync, phase, 1)
    wait(sync, phase, num_items)
