"""Merging against the fp64 sum, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch

from gpu_runtime.kernels.backend import Kernels, PackedWeight
from tests.runtime.kernels.arena import LAYER, Arena

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def merged(kernels: Kernels, arena: Arena, weight: torch.Tensor, slot: int) -> tuple[PackedWeight, PackedWeight]:
    """(base, base plus the slot's delta), packed."""
    packed = kernels.pack(weight)
    out = torch.full_like(packed.data, torch.nan)
    kernels.merge(out, weight=packed, pool=arena.pool.data, tables=arena.tables, slot=slot, layer=LAYER, sites=arena.sites)
    return packed, PackedWeight(out, packed.num_out)


def unpacked(kernels: Kernels, weight: PackedWeight, depth: int) -> torch.Tensor:
    """The matrix (O, D) as the backend's own product sees it, exactly: a row of the unit matrix picks a column."""
    return kernels.linear(torch.eye(depth), weight=weight).T


def oracle(arena: Arena, weight: torch.Tensor, slot: int) -> torch.Tensor:
    out = weight.double().clone()
    for target, (a, b, scale) in arena.adapters[slot].items():
        start, end = arena.sites.spans[target]
        out[start:end] += scale * (b.double() @ a.double())
    return out


@pytest.mark.parametrize(("depth", "widths"), [(64, [64, 32, 32]), (123, [31, 1, 65]), (576, [576, 192, 192]), (7, [5])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_fp64_sum(kernels: Kernels, depth: int, widths: list[int], dtype: torch.dtype) -> None:
    arena = Arena(in_features=depth, out_features=widths, num_slots=2)
    arena.install(0, ranks=dict.fromkeys(range(len(widths)), 8), dtype=dtype, seed=9)
    arena.install(1, ranks={at: (3, 33, 64)[at] for at in range(len(widths))}, dtype=dtype, seed=1)
    weight = torch.randn(sum(widths), depth, generator=torch.Generator().manual_seed(2))
    packed, out = merged(kernels, arena, weight, 1)
    difference = unpacked(kernels, out, depth).double() - oracle(arena, weight, 1)
    assert float(difference.abs().max()) < 2.0**-24 * (math.sqrt(64) + 2) * 16 * 2.5
    assert packed.data.equal(kernels.pack(weight).data), "the base weight was written to"


def test_targets_that_the_adapter_leaves_alone_are_copied_bit_for_bit(kernels: Kernels) -> None:
    arena = Arena(in_features=64, out_features=[40, 24, 40], num_slots=1)
    arena.install(0, ranks={1: 5}, dtype=torch.bfloat16, seed=0)
    weight = torch.randn(104, 64, generator=torch.Generator().manual_seed(3))
    _, out = merged(kernels, arena, weight, 0)
    seen = unpacked(kernels, out, 64)
    assert seen[:40].equal(weight[:40])
    assert seen[64:].equal(weight[64:])
    assert not seen[40:64].equal(weight[40:64])


def test_the_same_merge_gives_the_same_bits(kernels: Kernels) -> None:
    arena = Arena(in_features=64, out_features=[64], num_slots=2)
    arena.install(0, ranks={0: 16}, dtype=torch.bfloat16, seed=0)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    assert merged(kernels, arena, weight, 0)[1].data.equal(merged(kernels, arena, weight, 0)[1].data)
