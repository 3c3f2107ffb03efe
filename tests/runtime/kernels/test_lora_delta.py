"""The grouped LoRA op against an fp64 oracle, and what must not depend on the rest of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from gpu_runtime.core import NO_SLOT
from gpu_runtime.kernels.backend import Kernels, select_backend
from tests.runtime.conftest import kernels_named
from tests.runtime.kernels.arena import LAYER, Arena, batch_of_prompts, batch_of_slots, popularity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(kernels: Kernels, arena: Arena, y: torch.Tensor, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    out = y.clone()
    batch = batch_of_slots(slots)
    kernels.lora_delta(out, x=x, pool=arena.pool.data, tables=arena.tables, layer=LAYER, sites=arena.sites, batch=batch)
    return out


def inputs(arena: Arena, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = arena.sites.spans[-1][1]
    return torch.randn(num_tokens, width, generator=generator), torch.randn(num_tokens, arena.in_features, generator=generator)


def tolerance(arena: Arena, x: torch.Tensor) -> float:
    """Rounding of K then r f32 products: unit roundoff * (sqrt(K) + r) * the size of the terms (weights are read exactly).

    |x . a| is about |x| * sqrt(1/K * K) ~ 1-4, |b| up to 4, scale up to 2.5: terms of size 40 at the most.
    """
    widest = max((a.shape[0] for pairs in arena.adapters.values() for a, _, _ in pairs.values()), default=0)
    return 2.0**-24 * (math.sqrt(x.shape[1]) + widest) * 40


@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "zipf", "skewed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_fp64_oracle_whatever_is_popular(kernels: Kernels, kind: str, dtype: torch.dtype) -> None:
    arena = Arena(in_features=576, out_features=[576, 192, 192], num_slots=6)
    for slot, rank in enumerate([1, 3, 8, 16, 33, 64]):
        arena.install(slot, ranks={0: rank, 1: rank, 2: max(1, rank // 2)}, dtype=dtype, seed=slot)
    slots = popularity(kind, num_tokens=29, num_slots=6)
    y, x = inputs(arena, len(slots))
    difference = run(kernels, arena, y, x, slots).double() - arena.oracle(y, x, slots)
    assert float(difference.abs().max()) < tolerance(arena, x)


@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, [1]), (7, [5, 3]), (17, [16]), (33, [31, 1, 65]), (123, [123]), (1536, [576])]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_widths(kernels: Kernels, in_features: int, out_features: list[int], dtype: torch.dtype) -> None:
    arena = Arena(in_features=in_features, out_features=out_features, num_slots=3)
    for slot, rank in enumerate([1, 5, 64]):
        arena.install(slot, ranks=dict.fromkeys(range(len(out_features)), rank), dtype=dtype, seed=slot)
    slots = [0, 1, 1, 1, 1, 1, 2, 2, NO_SLOT, 0, *[2] * 11]
    y, x = inputs(arena, len(slots))
    difference = run(kernels, arena, y, x, slots).double() - arena.oracle(y, x, slots)
    assert float(difference.abs().max()) < tolerance(arena, x)


def test_dtypes_and_partial_targets_mix_in_one_batch(kernels: Kernels) -> None:
    arena = Arena(in_features=64, out_features=[64, 32, 32], num_slots=4)
    arena.install(0, ranks={0: 4}, dtype=torch.float32, seed=0)
    arena.install(1, ranks={1: 16}, dtype=torch.bfloat16, seed=1)
    arena.install(2, ranks={0: 2, 2: 64}, dtype=torch.float16, seed=2)
    slots = [2, 0, NO_SLOT, 1, 3, 2, 1, 0]  # slot 3 is empty
    y, x = inputs(arena, len(slots))
    out = run(kernels, arena, y, x, slots)
    assert float((out.double() - arena.oracle(y, x, slots)).abs().max()) < tolerance(arena, x)
    assert torch.equal(out[0, 64:96], y[0, 64:96]), "a target without a pair must stay as it was"


def test_base_rows_are_left_alone_bit_for_bit(kernels: Kernels) -> None:
    arena = Arena(in_features=64, out_features=[64, 32, 32], num_slots=2)
    arena.install(0, ranks={0: 8, 1: 8, 2: 8}, dtype=torch.bfloat16, seed=0)
    slots = [NO_SLOT, 0, NO_SLOT, NO_SLOT, 1, 0, NO_SLOT]
    y, x = inputs(arena, len(slots))
    y[0, 0] = -0.0
    out = run(kernels, arena, y, x, slots)
    untouched = [at for at, slot in enumerate(slots) if slot != 0]
    assert out[untouched].view(torch.int32).equal(y[untouched].view(torch.int32))
    assert not torch.equal(out[1], y[1])


@pytest.mark.parametrize("fill", [float("nan"), 1e30, float("inf")])
def test_a_poisoned_neighbour_changes_no_bit_of_mine(kernels: Kernels, fill: float) -> None:
    arena = Arena(in_features=576, out_features=[576, 192, 192], num_slots=3)
    arena.install(0, ranks={0: 16, 1: 16, 2: 16}, dtype=torch.bfloat16, seed=0)
    arena.install(1, ranks={0: 64, 1: 64, 2: 64}, dtype=torch.bfloat16, seed=1, fill=fill)
    arena.install(2, ranks={0: 16, 1: 16, 2: 16}, dtype=torch.bfloat16, seed=2)
    y, x = inputs(arena, 9)
    clean = run(kernels, arena, y, x, [0, 0, 2, 2, NO_SLOT, 2, 0, 2, 0])
    beside = run(kernels, arena, y, x, [0, 1, 2, 1, NO_SLOT, 1, 0, 1, 0])
    mine = [0, 2, 4, 6, 8]
    if kernels.name == "reference":  # its products round by the number of rows
        torch.testing.assert_close(beside[mine], clean[mine], rtol=0, atol=1e-4)
    else:
        assert beside[mine].equal(clean[mine])
    assert not beside[[1, 3, 5, 7]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Bitwise, for the backend that promises it: alone, in other company, in another order, on one thread."""
    arena = Arena(in_features=576, out_features=[1536, 1536], num_slots=5)
    for slot, rank in enumerate([16, 8, 64, 3, 1]):
        arena.install(slot, ranks={0: rank, 1: rank}, dtype=dtype, seed=slot)
    slots = [0, 0, 0, 0, 0, 1, 2, 2, 3, 4, 0, 2, 1, NO_SLOT]
    y, x = inputs(arena, len(slots))
    together = run(select_backend(threads=2), arena, y, x, slots)
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(3))
    one_thread = select_backend(threads=1)
    shuffled = run(one_thread, arena, y[order], x[order], [slots[at] for at in order])
    assert shuffled.equal(together[order])
    for at, slot in enumerate(slots):
        assert run(one_thread, arena, y[at : at + 1], x[at : at + 1], [slot])[0].equal(together[at])


def test_ranks_beyond_the_true_one_are_never_read(kernels: Kernels) -> None:
    """A reused slot: rows of a wide former adapter must not shine through, and freed pages are 0xFF."""
    arena = Arena(in_features=64, out_features=[64], num_slots=1)
    arena.install(0, ranks={0: 64}, dtype=torch.float32, seed=0)
    arena.tables.clear(0)
    arena.pool.free([page for page in range(arena.pool.num_pages) if arena.pool.owner_of(page) is not None])
    arena.install(0, ranks={0: 5}, dtype=torch.bfloat16, seed=1)
    y, x = inputs(arena, 6)
    out = run(kernels, arena, y, x, [0] * 6)
    assert float((out.double() - arena.oracle(y, x, [0] * 6)).abs().max()) < tolerance(arena, x)


PROMPTS = [(5, 0), (1, 1), (33, 2), (2, 2), (1, NO_SLOT), (7, NO_SLOT), (31, 3), (1, 0)]  # (tokens, slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_and_decode_rows_share_a_batch(kernels: Kernels, dtype: torch.dtype) -> None:
    arena = Arena(in_features=123, out_features=[70, 33], num_slots=5)
    for slot, rank in enumerate([16, 8, 64, 5]):
        arena.install(slot, ranks={0: rank, 1: max(1, rank // 3)} if slot else {1: rank}, dtype=dtype, seed=slot)
    slots = [slot for count, slot in PROMPTS for _ in range(count)]
    y, x = inputs(arena, len(slots))
    out = y.clone()
    batch = batch_of_prompts(PROMPTS)
    kernels.lora_delta(out, x=x, pool=arena.pool.data, tables=arena.tables, layer=LAYER, sites=arena.sites, batch=batch)
    assert float((out.double() - arena.oracle(y, x, slots)).abs().max()) < tolerance(arena, x)
    base = [at for at, slot in enumerate(slots) if slot == NO_SLOT]
    assert out[base].equal(y[base])


@pytest.mark.parametrize("stored", DTYPES)
def test_activations_of_16_bits(stored: torch.dtype) -> None:
    """The GPU's own case: products are exact in f32, so what is left is f32 sums and one rounding of y.

    In f16 alone: the interpreter multiplies the bits of bf16 as integers and cuts where a GPU rounds.
    """
    dtype = torch.float16
    arena = Arena(in_features=96, out_features=[48, 64], num_slots=2)
    arena.install(0, ranks={0: 16, 1: 4}, dtype=stored, seed=0)
    arena.install(1, ranks={0: 40}, dtype=stored, seed=1)
    prompts = [(1, 0), (9, 1), (1, NO_SLOT), (3, 0)]
    slots = [slot for count, slot in prompts for _ in range(count)]
    y, x = (part.to(dtype) for part in inputs(arena, len(slots)))
    out = y.clone()
    where = {"pool": arena.pool.data, "tables": arena.tables, "layer": LAYER, "sites": arena.sites}
    kernels_named("gpu").lora_delta(out, x=x, batch=batch_of_prompts(prompts), **where)
    exact = arena.oracle(y, x, slots)
    rounding = torch.finfo(dtype).eps / 2
    assert bool(((out.double() - exact).abs() <= rounding * exact.abs() + tolerance(arena, x.float())).all())
