"""RMSNorm with the residual's addition, and the gated activation: one pass over memory each, arithmetic in f32.

Semantics: x += added; y = x / sqrt(mean(x^2) + eps) * weight        and        y = silu(gate) * up, or gelu(gate) * up.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_F = 1024  # columns of the gated activation's tile


@triton.jit
def rms_norm(y, x, added, weight, num_columns, eps, HAS_ADDED: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token."""
    row = tl.program_id(0).to(tl.int64) * num_columns
    d = tl.arange(0, BLOCK_D)
    inside = d < num_columns
    value = tl.load(x + row + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        value += tl.load(added + row + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + row + d, value.to(x.dtype.element_ty), mask=inside)
    size = tl.rsqrt(tl.sum(value * value, axis=0) / num_columns + eps)
    scaled = value * size * tl.load(weight + d, mask=inside, other=0.0)
    tl.store(y + row + d, scaled.to(y.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(y, gate_up, num_columns, BLOCK_F: tl.constexpr):  # type: ignore[no-untyped-def]
    """One (token, block of columns) of y (T, F) from [gate | up] (T, 2F)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < num_columns
    gate = tl.load(gate_up + row * 2 * num_columns + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * num_columns + num_columns + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * num_columns + f, (gate / (1.0 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_mul(y, gate_up, num_columns, BLOCK_F: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same with gelu in its tanh form: 0.5 g (1 + tanh(u)) = g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < num_columns
    gate = tl.load(gate_up + row * 2 * num_columns + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * num_columns + num_columns + f, mask=inside, other=0.0).to(tl.float32)
    turned = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    tl.store(y + row * num_columns + f, (turned * up).to(y.dtype.element_ty), mask=inside)
