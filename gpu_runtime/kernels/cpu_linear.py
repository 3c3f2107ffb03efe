"""Owns x @ weight.T on a CPU for the row counts of decode: a register-tiled product over packed activations.

Floor, SmolLM2-135M in fp32 at T tokens: 425 MB of layer weights read once a step (16-25 ms at the 17-26 GB/s that two
cores of a shared machine reach) and 2 * 106e6 * T FLOPs (18 ms at T = 16 on two AVX2 cores). Libraries treat T = 2..64
as neither a vector nor a matrix product and lose half of both.

How: activations are packed to (K, 16), sixteen tokens abreast. For every k one vector of 16 activations meets the
broadcast weights of ROWS output rows, so a weight is loaded once for 16 tokens and nothing is ever summed across lanes:
y[t, o] is one chain of fused multiply-adds over k = 0, 1, 2 ... whatever T is. That makes a row's result independent of
the rest of the batch, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # tokens abreast: two AVX2 registers or one of AVX-512
ROWS = 6  # output rows a tile: 12 AVX2 accumulators leave room for the activations and a broadcast weight
MAX_TOKENS = 128  # measured: beyond this the library's blocked product catches up

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_SIGNATURE = types.void(types.uint64, types.int64, types.uint64, types.uint64)


def _emit_tile(num_rows: int, builder: Any, arguments: Any) -> None:
    """tile[r, :] = sum over k of weight[r, k] * packed[k, :], for `num_rows` rows that lie K apart."""
    weight, num_k, packed, tile = arguments
    floats, vectors = _F32.as_pointer(), _VECTOR.as_pointer()
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fma.v16f32")
    row_bytes = builder.mul(num_k, ir.Constant(_I64, 4))
    rows = [builder.inttoptr(builder.add(weight, builder.mul(row_bytes, ir.Constant(_I64, r))), floats) for r in range(num_rows)]
    activations, out = builder.inttoptr(packed, vectors), builder.inttoptr(tile, vectors)

    entry, loop, done = builder.block, builder.append_basic_block("k"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    k.add_incoming(ir.Constant(_I64, 0), entry)
    sums = [builder.phi(_VECTOR) for _ in rows]
    x = builder.load(builder.gep(activations, [k]))
    x.align = 4
    updated = [
        builder.call(fma, [_broadcast(builder, builder.load(builder.gep(row, [k]))), x, held]) for row, held in zip(rows, sums, strict=True)
    ]
    following = builder.add(k, ir.Constant(_I64, 1))
    k.add_incoming(following, loop)
    for held, new in zip(sums, updated, strict=True):
        held.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), entry)
        held.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_k), loop, done)

    builder.position_at_end(done)
    for r, new in enumerate(updated):
        builder.store(new, builder.gep(out, [ir.Constant(_I64, r)])).align = 4


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


@intrinsic
def _tile(typing_context, weight, num_k, packed, tile):  # type: ignore[no-untyped-def]  # numba reads the parameters' names
    """ROWS output rows by LANES tokens. Addresses are uint64; `tile` is f32 (ROWS, LANES)."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_tile(ROWS, builder, arguments)
        return context.get_dummy_value()

    return _SIGNATURE, emit


@intrinsic
def _single_row(typing_context, weight, num_k, packed, tile):  # type: ignore[no-untyped-def]
    """One output row by LANES tokens, for the rows that do not fill a tile."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_tile(1, builder, arguments)
        return context.get_dummy_value()

    return _SIGNATURE, emit


@njit(types.void(types.float32[:, ::1], types.float32[:, ::1], types.float32[:, ::1], types.int64), parallel=True, cache=True)
def _linear(x, weight, out, num_parts):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """out (T, O) = x (T, K) @ weight (O, K).T; output rows are dealt to `num_parts` threads in whole tiles."""
    num_tokens, num_k = x.shape
    num_rows = weight.shape[0]
    num_packs = (num_tokens + LANES - 1) // LANES
    packed = np.zeros((num_packs, num_k, LANES), np.float32)
    for token in range(num_tokens):
        pack, lane = token // LANES, token % LANES
        for k in range(num_k):
            packed[pack, k, lane] = x[token, k]
    num_tiles = (num_rows + ROWS - 1) // ROWS
    tiles_a_part = (num_tiles + num_parts - 1) // num_parts
    for part in prange(num_parts):
        tile = np.empty((ROWS, LANES), np.float32)
        tile_at, weight_at, packed_at = np.uint64(tile.ctypes.data), np.uint64(weight.ctypes.data), np.uint64(packed.ctypes.data)
        for index in range(part * tiles_a_part, min(num_tiles, (part + 1) * tiles_a_part)):
            first = index * ROWS
            filled = min(ROWS, num_rows - first)
            for pack in range(num_packs):  # innermost, so that the tile's weights come from L1 after the first pack
                pack_at = packed_at + np.uint64(pack * num_k * LANES * 4)
                if filled == ROWS:
                    _tile(weight_at + np.uint64(first * num_k * 4), num_k, pack_at, tile_at)
                else:
                    for r in range(filled):
                        _single_row(weight_at + np.uint64((first + r) * num_k * 4), num_k, pack_at, tile_at + np.uint64(r * LANES * 4))
                for lane in range(min(LANES, num_tokens - pack * LANES)):
                    for r in range(filled):
                        out[pack * LANES + lane, first + r] = tile[r, lane]


def linear(x: torch.Tensor, *, weight: torch.Tensor, num_threads: int) -> torch.Tensor:
    """x @ weight.T. x f32 (T, K), weight f32 (O, K), both contiguous; result f32 (T, O) contiguous.

    Up to MAX_TOKENS tokens a row's result is independent of the other rows, bit for bit.
    """
    if x.shape[0] > MAX_TOKENS or weight.dtype != torch.float32:
        return (weight.float() @ x.t()).t().contiguous()
    out = torch.empty(x.shape[0], weight.shape[0])
    _linear(x.numpy(), weight.numpy(), out.numpy(), num_threads)
    return out
