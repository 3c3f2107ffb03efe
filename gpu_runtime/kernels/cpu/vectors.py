"""Owns the vector code: three tiles, emitted as LLVM IR, on which every CPU kernel rests.

    tile(x, W)      y[t, o]  = sum_d x[t, d] * W[d, o]      W a packed panel (D, PANEL) of f32
    dots(x, w)      s[t, r]  = sum_d x[t, d] * w[r][d]      w rows anywhere in memory, f32, f16 or bf16
    combine(v, w)   y[t, d] += sum_r v[t, r] * w[r][d]      the same rows

Written as IR because numba cannot be told to keep an accumulator tile in registers, nor to widen bf16 in a load. Sums are
f32 fused multiply-adds in a fixed order that depends on D alone: never on how many tokens share a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_runtime.core import F16, F32


def _lanes() -> int:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


LANES = _lanes()  # f32 lanes of a vector register
PANEL = 2 * LANES  # output features of a packed panel
TILE_TOKENS = 6 if LANES == 8 else 8  # 2 * TILE_TOKENS accumulators + 3 fit the registers (AVX2 has 16, the others 32)

_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
Values = list[Any]


def _const(value: int) -> Any:
    return ir.Constant(_I64, value)


def _zero(kind: Any) -> Any:
    return ir.Constant(kind, [0.0] * LANES) if isinstance(kind, ir.VectorType) else ir.Constant(kind, 0.0)


def _at(b: Any, address: Any, offset: Any, kind: Any) -> Any:
    """Pointer to `kind` at `address` + `offset` bytes."""
    return b.inttoptr(b.add(address, offset), kind.as_pointer())


def _load(b: Any, pointer: Any, align: int) -> Any:
    value = b.load(pointer)
    value.align = align
    return value


def _store(b: Any, value: Any, pointer: Any) -> None:
    b.store(value, pointer).align = 4


def _fma(b: Any, left: Any, right: Any, added: Any) -> Any:
    kind = added.type
    name = f"llvm.fma.v{LANES}f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), name), [left, right, added])


def _broadcast(b: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    return b.shuffle_vector(
        b.insert_element(undefined, scalar, ir.Constant(_I32, 0)), undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    )


def _sum_lanes(b: Any, vector: Any) -> Any:
    """Pairwise, upper half onto lower half, so that the order is fixed."""
    width = LANES
    while width > 1:
        width //= 2
        indices = ir.VectorType(_I32, width)
        low = b.shuffle_vector(vector, vector, ir.Constant(indices, list(range(width))))
        high = b.shuffle_vector(vector, vector, ir.Constant(indices, list(range(width, 2 * width))))
        vector = b.fadd(low, high)
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _load_row(b: Any, row: Any, index: Any, code: int, vector: bool) -> Any:
    """Element(s) `index` of a stored row, widened to f32: bf16 by a shift, f16 by conversion."""
    stored = (_FLOAT, ir.HalfType(), ir.IntType(16))[code]
    size = 4 if code == F32 else 2
    kind = ir.VectorType(stored, LANES) if vector else stored
    value = _load(b, _at(b, row, b.mul(index, _const(size)), kind), size)
    if code == F32:
        return value
    wide = _VECTOR if vector else _FLOAT
    if code == F16:
        return b.fpext(value, wide)
    integers: Any = ir.VectorType(_I32, LANES) if vector else _I32
    sixteen = ir.Constant(integers, [16] * LANES) if vector else ir.Constant(integers, 16)
    return b.bitcast(b.shl(b.zext(value, integers), sixteen), wide)


def _loop(b: Any, start: Any, end: Any, step: int, carried: Sequence[Any], body: Callable[[Any, Values], Values]) -> Values:
    """for i = start; i < end; i += step: carried = body(i, carried). Returns the carried values after the loop."""
    entry = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(_I64)
    index.add_incoming(start, entry)
    phis = [b.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, entry)
    b.cbranch(b.icmp_signed("<", index, end), inside, after)
    b.position_at_end(inside)
    results = body(index, phis)
    index.add_incoming(b.add(index, _const(step)), b.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return phis


def _vector_end(b: Any, length: Any) -> Any:
    """`length` rounded down to whole vectors."""
    return b.and_(length, _const(-LANES))


def _void(codegen: Callable[[Any, Values], None], num_args: int) -> Any:
    def lower(context: Any, builder: Any, _signature: Any, args: Values) -> Any:
        codegen(builder, args)
        return context.get_dummy_value()

    return types.void(*[types.intp] * num_args), lower


def _emit_tile(b: Any, args: Values, num_tokens: int) -> None:
    weights, x, x_stride, depth, y, y_stride = args

    def body(index: Any, sums: Values) -> Values:
        offset = b.mul(index, _const(4 * PANEL))
        panel = [_load(b, _at(b, weights, b.add(offset, _const(4 * LANES * half)), _VECTOR), 4) for half in (0, 1)]
        results = []
        for token in range(num_tokens):
            value = _load(b, _at(b, x, b.add(b.mul(x_stride, _const(token)), b.mul(index, _const(4))), _FLOAT), 4)
            spread = _broadcast(b, value)
            results += [_fma(b, panel[half], spread, sums[2 * token + half]) for half in (0, 1)]
        return results

    sums = _loop(b, _const(0), depth, 1, [_zero(_VECTOR)] * (2 * num_tokens), body)
    for at, total in enumerate(sums):
        offset = b.add(b.mul(y_stride, _const(at // 2)), _const(4 * LANES * (at % 2)))
        _store(b, total, _at(b, y, offset, _VECTOR))


def _emit_dots(b: Any, args: Values, num_tokens: int, num_rows: int, code: int) -> None:
    x, x_stride, depth, out, out_stride, *rows = args

    def body(vector: bool) -> Callable[[Any, Values], Values]:
        def accumulate(index: Any, sums: Values) -> Values:
            weights = [_load_row(b, row, index, code, vector) for row in rows]
            starts = [b.add(x, b.mul(x_stride, _const(token))) for token in range(num_tokens)]
            values = [_load_row(b, start, index, F32, vector) for start in starts]
            return [_fma(b, values[at // num_rows], weights[at % num_rows], total) for at, total in enumerate(sums)]

        return accumulate

    whole = _vector_end(b, depth)
    vectors = _loop(b, _const(0), whole, LANES, [_zero(_VECTOR)] * (num_tokens * num_rows), body(vector=True))
    sums = _loop(b, whole, depth, 1, [_sum_lanes(b, vector) for vector in vectors], body(vector=False))
    for at, total in enumerate(sums):
        offset = b.add(b.mul(out_stride, _const(at // num_rows)), _const(4 * (at % num_rows)))
        _store(b, total, _at(b, out, offset, _FLOAT))


def _emit_combine(b: Any, args: Values, num_tokens: int, num_rows: int, code: int) -> None:
    y, y_stride, width, factors, factor_stride, *rows = args
    scalars = [
        _load(b, _at(b, factors, b.add(b.mul(factor_stride, _const(at // num_rows)), _const(4 * (at % num_rows))), _FLOAT), 4)
        for at in range(num_tokens * num_rows)
    ]
    spread = [_broadcast(b, scalar) for scalar in scalars]

    def body(vector: bool) -> Callable[[Any, Values], Values]:
        def accumulate(index: Any, _none: Values) -> Values:
            weights = [_load_row(b, row, index, code, vector) for row in rows]
            for token in range(num_tokens):
                start = b.add(y, b.mul(y_stride, _const(token)))
                total = _load_row(b, start, index, F32, vector)
                for row, weight in enumerate(weights):
                    total = _fma(b, (spread if vector else scalars)[token * num_rows + row], weight, total)
                _store(b, total, _at(b, start, b.mul(index, _const(4)), total.type))
            return []

        return accumulate

    whole = _vector_end(b, width)
    _loop(b, _const(0), whole, LANES, [], body(vector=True))
    _loop(b, whole, width, 1, [], body(vector=False))


@intrinsic
def prefetch(_context, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at `address`; a hint that never faults."""

    def emit(b: Any, args: Values) -> None:
        pointer = b.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        hint = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(hint, [pointer, *(ir.Constant(_I32, value) for value in (0, 3, 1))])  # a read, keep it close, data

    return _void(emit, 1)


def make_tile(num_tokens: int) -> Any:
    """tile(weights, x, x_stride, depth, y, y_stride): addresses, strides in bytes; writes `num_tokens` x PANEL results."""

    @intrinsic
    def tile(_context, weights, x, x_stride, depth, y, y_stride):  # type: ignore[no-untyped-def]
        return _void(lambda b, args: _emit_tile(b, args, num_tokens), 6)

    return tile


def _with_rows(emit: Callable[..., None], num_tokens: int, num_rows: int, code: int) -> Any:
    if num_rows == 1:

        @intrinsic
        def one_row(_context, a, a_stride, length, c, c_stride, row):  # type: ignore[no-untyped-def]
            return _void(lambda b, args: emit(b, args, num_tokens, 1, code), 6)

        return one_row

    @intrinsic
    def four_rows(_context, a, a_stride, length, c, c_stride, row0, row1, row2, row3):  # type: ignore[no-untyped-def]
        return _void(lambda b, args: emit(b, args, num_tokens, 4, code), 9)

    return four_rows


def make_dots(num_tokens: int, num_rows: int, code: int) -> Any:
    """dots(x, x_stride, depth, out, out_stride, *row addresses) with 1 or 4 rows stored as `code`."""
    return _with_rows(_emit_dots, num_tokens, num_rows, code)


def make_combine(num_tokens: int, num_rows: int, code: int) -> Any:
    """combine(y, y_stride, width, factors, factor_stride, *row addresses) with 1 or 4 rows stored as `code`."""
    return _with_rows(_emit_combine, num_tokens, num_rows, code)
