"""`make gpu-check`: what needs a GPU, in minutes, with random weights. Without one it says so and ends with 0.

Every launch is compared with fp64 from the same bytes; shrink and expand are timed against padded bmm and dLoRA's einsum on the
shapes of Llama-3.1-8B (q 4096 -> 4096, k 4096 -> 1024, gate 4096 -> 14336, down 14336 -> 4096). Rows as in `make bench-serving`, JSON
with device, versions and commit. Needs torch, triton, numpy and safetensors alone. No GPU has run it yet.
Floor of a decode row: the adapters' bytes at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from gpu_runtime.kernels.backend import Kernels, select_backend
from gpu_runtime.kernels.rows import read_factors
from tests.bench.gpu.world import World, one_hot_einsum, padded_bmm
from tests.bench.rows import Row, show, status, write

COMMAND = "make gpu-check"
SHAPES = {"q": (4096, 4096), "k": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096)}
RANKS, ADAPTERS, DECODE, PREFILL = (8, 16, 64, 128), (1, 8, 64), (1, 16, 64, 256), (512, 4096)
GOAL = 1.3
MAX_STACK_BYTES = 8 << 30  # of what a rival gathers
BF16_ROUNDING = 2.0**-8


def error_of_delta(kernels: Kernels, world: World, lengths: list[tuple[int, int]]) -> float:
    """Largest difference from fp64 in units of what rounding allows: at most 1 is right."""
    batch = world.batch(lengths)
    y, x = world.inputs(batch.num_tokens)
    expected = world.oracle(y, x, batch)
    world.ours(kernels, y, x, batch)
    return float(((y.double() - expected).abs() / world.bound(expected)).max())


def error_of_merge(kernels: Kernels, world: World) -> float:
    weight = torch.randn(world.out_features, world.in_features, device=world.device).to(world.dtype)
    packed, out = kernels.pack(weight), torch.empty_like(weight)
    kernels.merge(out, weight=packed, pool=world.pool.data, tables=world.tables, slot=0, layer=0, sites=world.sites)
    [one] = read_factors(world.pool.data, tables=world.tables, slot=0, layer=0, sites=world.sites, depth=world.in_features)
    expected = weight.double() + one.b.double().T @ one.a.double()
    return float(((out.double() - expected).abs() / world.bound(expected)).max())


def error_of_elementwise(kernels: Kernels, *, num_tokens: int, width: int, device: str) -> float:
    x = torch.randn(num_tokens, width, device=device).to(torch.bfloat16)
    weight = torch.randn(width, device=device).to(torch.bfloat16)
    wide = x.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    gate, up = wide.chunk(2, dim=1)
    found = ((kernels.rms_norm(x, weight=weight, eps=1e-5), normed), (kernels.silu_mul(x), gate * gate.sigmoid() * up))
    return max(float(((got.double() - expected).abs() / (4 * BF16_ROUNDING * (1 + expected.abs()))).max()) for got, expected in found)


def correctness(
    kernels: Kernels, *, device: str, shapes: dict[str, tuple[int, int]], ranks: tuple[int, ...], dtype: torch.dtype
) -> list[Row]:
    rows = []
    for name, (num_in, num_out) in shapes.items():
        for rank in ranks:
            world = World(in_features=num_in, out_features=num_out, num_adapters=4, rank=rank, device=device, dtype=dtype)
            mixed = [(1, 0), (1, 3), (33, 1), (1, -1), (1, 0), (5, 2), (1, 2)]
            rows.append(_right(f"{name} rank {rank}: decode, prompts and base rows mixed", error_of_delta(kernels, world, mixed)))
            rows.append(_right(f"{name} rank {rank}: merge", error_of_merge(kernels, world)))
        rows.append(_right(f"{name}: norm and activation", error_of_elementwise(kernels, num_tokens=9, width=num_in, device=device)))
    return rows


def _right(name: str, error: float) -> Row:
    return Row(
        name, error if math.isfinite(error) else 1e9, 1.0, COMMAND, at_most=True, unit="bound", detail="against fp64 from the same bytes"
    )


def median_ms(call: Callable[[], None], *, repeats: int = 30) -> float:
    """On the device's clock, caches as they are."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bytes_s(device: str) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * median_ms(lambda: target.copy_(source), repeats=10))


def timings(kernels: Kernels, *, device: str) -> list[Row]:
    bytes_s, rows = copy_bytes_s(device), []
    for name, (num_in, num_out) in SHAPES.items():
        for rank in RANKS:
            for number in ADAPTERS:
                world = World(in_features=num_in, out_features=num_out, num_adapters=number, rank=rank, device=device)
                stacks = world.stacks()
                of = f"{name} rank {rank}, {number} adapters"
                loads = {f"decode {tokens}": [(1, at % number) for at in range(tokens)] for tokens in DECODE}
                loads |= {f"prefill {tokens}": [(tokens // number, at) for at in range(number)] for tokens in PREFILL}
                rows += [_timed(f"{what} x {of}", world, stacks, lengths=lengths, bytes_s=bytes_s) for what, lengths in loads.items()]
    best = [row.value for row in rows if row.value is not None]
    mean = math.exp(statistics.fmean(map(math.log, best)))
    return [Row("geometric mean, best rival / ours", mean, GOAL, COMMAND, detail=f"{len(best)} shapes"), *rows]


def _timed(title: str, world: World, stacks: tuple[torch.Tensor, torch.Tensor], *, lengths: list[tuple[int, int]], bytes_s: float) -> Row:
    """Time of the faster rival over ours; metadata is made outside for all of them."""
    batch = world.batch(lengths)
    y, x = world.inputs(batch.num_tokens)
    a, b = stacks
    kernels, slots = select_backend(world.device), batch.slots.long()
    ours = median_ms(lambda: world.ours(kernels, y, x, batch))
    rivals = {}
    if batch.num_tokens * (a[0].numel() + b[0].numel()) * 2 <= MAX_STACK_BYTES:
        rivals["padded bmm"] = median_ms(lambda: padded_bmm(y, x, a, b, slots))
        one_hot = torch.nn.functional.one_hot(slots, a.shape[0]).to(x.dtype)
        rivals["einsum"] = median_ms(lambda: one_hot_einsum(y, x, a, b, one_hot))
    distinct = len({slot for _, slot in lengths})
    floor_ms = 1e3 * distinct * world.adapter_bytes / bytes_s
    told = ", ".join(f"{rival} {took:.3f}" for rival, took in rivals.items())
    value = min(rivals.values()) / ours if rivals else None
    floor = min(rivals.values()) / floor_ms if rivals else None
    return Row(
        f"{title}: best rival / ours", value, None, COMMAND, floor=floor, detail=f"ours {ours:.3f} ms, bytes alone {floor_ms:.3f}; {told}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: torch sees no CUDA device, so there is nothing to check")
        return
    kernels = select_backend("cuda")
    rows = correctness(kernels, device="cuda", shapes=SHAPES, ranks=RANKS, dtype=torch.bfloat16) + timings(kernels, device="cuda")
    show(rows)
    write(options.output, rows, device=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda)
    raise SystemExit(1 if status(rows) == 1 else 0)  # a rival that does not fit is no failure of ours


if __name__ == "__main__":
    main()
