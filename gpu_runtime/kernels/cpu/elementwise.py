"""RMSNorm and the gated activation: a token is an item.

Semantics: x += added; y = x / sqrt(mean(x^2) + eps) * weight        and        y = silu(gate) * up, or gelu(gate) * up.

Floor: both are in cache; their cost is the exponentials (SmolLM2 at batch 16: 737 thousand a step, about 1 ms as vectors).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpu_runtime.core import F32
from gpu_runtime.kernels.cpu.compiled import inlined
from gpu_runtime.kernels.cpu.sync import claim, finish, wait
from gpu_runtime.kernels.cpu.vectors import make_dots

_f = np.float32
_LOG2_E, _LN2_HIGH, _LN2_LOW = _f(1.4426950408889634), _f(0.693359375), _f(-2.12194440e-4)
_ROUND, _ROUND_BITS = _f(12582912.0), 0x4B400000  # 1.5 * 2^23: adding it rounds to a whole number in the low bits
_MOST, _LEAST = _f(88.3), _f(-87.3)
_C2, _C3, _C4, _C5, _C6, _C7 = (_f(1 / math.factorial(k)) for k in range(2, 8))
_ONE, _ZERO, _INFINITE = _f(1), _f(0), _f(math.inf)
_GELU, _CUBE = _f(-2 * math.sqrt(2 / math.pi)), _f(0.044715)

_square = make_dots(1, 1, F32)


@intrinsic  # type: ignore[untyped-decorator]
def _bits(_context: Any, value: Any) -> Any:
    """f32 -> its 32 bits."""
    return types.int32(types.float32), lambda _c, b, _s, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic  # type: ignore[untyped-decorator]
def _from_bits(_context: Any, value: Any) -> Any:
    return types.float32(types.int32), lambda _c, b, _s, args: b.bitcast(args[0], ir.FloatType())


@inlined
def exp(value):  # type: ignore[no-untyped-def]
    """e^value in f32 within 2 ulp, no calls and no branches, so that loops over it become vectors. NaN stays NaN.

    e^v = 2^n * e^r with n = round(v / ln 2) and |r| <= ln 2 / 2 (Cody and Waite), e^r by its Taylor polynomial.
    """
    bounded = _MOST if value > _MOST else value
    bounded = _LEAST if bounded < _LEAST else bounded
    shifted = bounded * _LOG2_E + _ROUND
    whole = shifted - _ROUND
    rest = bounded - whole * _LN2_HIGH - whole * _LN2_LOW
    series = _ONE + rest * (_ONE + rest * (_C2 + rest * (_C3 + rest * (_C4 + rest * (_C5 + rest * (_C6 + rest * _C7))))))
    exponent = np.int32((np.int32(_bits(shifted) - np.int32(_ROUND_BITS)) + np.int32(127)) << np.int32(23))
    result = series * _from_bits(exponent)
    result = _INFINITE if value > _MOST else result
    return _ZERO if value < _LEAST else result


@inlined
def rms_norm(sync, phase, x, added, has_added, weight, eps, y):  # type: ignore[no-untyped-def]
    """x, added, y (T, D); weight (D). `added` is read only where `has_added`; y may be `added` itself, not x."""
    num_tokens, width = x.shape
    while True:
        token = claim(sync, phase, 1)
        if token >= num_tokens:
            break
        if has_added:
            for at in range(width):
                x[token, at] += added[token, at]
        row = x.ctypes.data + token * width * 4
        _square(row, 0, width, y.ctypes.data + token * width * 4, 0, row)  # the sum lies in y[token, 0] until y is written
        factor = _ONE / _f(math.sqrt(y[token, 0] / _f(width) + eps))
        for at in range(width):
            y[token, at] = x[token, at] * factor * weight[at]
        finish(sync, phase, 1)
    wait(sync, phase, num_tokens)


@inlined
def silu_mul(sync, phase, gate_up, y):  # type: ignore[no-untyped-def]
    """gate_up (T, 2F) = [gate | up], y (T, F)."""
    num_tokens, width = y.shape
    while True:
        token = claim(sync, phase, 1)
        if token >= num_tokens:
            break
        for at in range(width):
            gate = gate_up[token, at]
            y[token, at] = gate / (_ONE + exp(-gate)) * gate_up[token, width + at]
        finish(sync, phase, 1)
    wait(sync, phase, num_tokens)


@inlined
def gelu_mul(sync, phase, gate_up, y):  # type: ignore[no-untyped-def]
    """gate_up (T, 2F) = [gate | up], y (T, F). 0.5 g (1 + tanh(u)) = g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3)."""
    num_tokens, width = y.shape
    while True:
        token = claim(sync, phase, 1)
        if token >= num_tokens:
            break
        for at in range(width):
            gate = gate_up[token, at]
            y[token, at] = gate / (_ONE + exp(_GELU * (gate + _CUBE * gate * gate * gate))) * gate_up[token, width + at]
        finish(sync, phase, 1)
    wait(sync, phase, num_tokens)
