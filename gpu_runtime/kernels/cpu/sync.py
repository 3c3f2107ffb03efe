"""Owns how threads share one step: phases of independent items, claimed one at a time.

A phase is over when all its items are done, not when all threads have arrived. So a helper thread that is late, or that
the system has put aside, holds nothing up but the one item it may be working on, and a step needs no helper at all.

sync is int64 (phases, 16), zeroed before a step: [p, 0] counts claimed items and [p, 8] finished ones, each on its own
cache line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_runtime.kernels.cpu.compiled import inlined

CLAIMED, FINISHED, WIDTH = 0, 8, 16
SPINS = 4000  # about 10 us; after that the core is offered to others on every look


def new_sync(num_phases: int) -> np.ndarray[Any, Any]:
    return np.zeros((num_phases, WIDTH), dtype=np.int64)


@intrinsic  # type: ignore[untyped-decorator]
def _atomic_add(_context: Any, address: Any, amount: Any) -> Any:
    """Adds and returns the value before; sequentially consistent."""

    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.intp, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def _atomic_load(_context: Any, address: Any) -> Any:
    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.intp), lower


@intrinsic  # type: ignore[untyped-decorator]
def _yield_core(_context: Any) -> Any:
    """sched_yield(2), from the C library."""

    def lower(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), lower


@inlined
def claim(sync, phase, count):  # type: ignore[no-untyped-def]
    """The next `count` items of a phase: the first of them (it may lie beyond the phase's end)."""
    return _atomic_add(sync.ctypes.data + (phase * WIDTH + CLAIMED) * 8, count)


@inlined
def finish(sync, phase, count):  # type: ignore[no-untyped-def]
    """`count` claimed items of the phase are done, and what they wrote is visible to whoever waits."""
    _atomic_add(sync.ctypes.data + (phase * WIDTH + FINISHED) * 8, count)


@inlined
def wait(sync, phase, num_items):  # type: ignore[no-untyped-def]
    """Until all items of the phase are done."""
    address = sync.ctypes.data + (phase * WIDTH + FINISHED) * 8
    spins = 0
    while _atomic_load(address) < num_items:
        spins += 1
        if spins > SPINS:
            _yield_core()
