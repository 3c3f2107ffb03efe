"""Time of one decode step on the real base model: base rows, distinct adapters, and the floor of the same step.

Usage: python tests/bench/step_time.py [--model DIR] [--batches 1,4,8,16,32] [--context 128] [--rank 16] [--dtype bfloat16]

Random adapters on all linears. Prints one JSON line a batch size, milliseconds, the fastest of --repeats steps:
  base_ms     every row on the base model          adapter_ms  every row on an adapter of its own
  logits_ms   of base_ms, the final norm and head  sample_ms   greedy sampling of the batch
  floor_ms    bytes that the base step must read at the read bandwidth measured in the same run, or its FLOPs at the
              rate measured in the same run, whichever is more     adapter_floor_ms  the same with the adapters' bytes
Other work on the machine shows in every column: run it idle.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpu_runtime.core import NO_SLOT, TARGETS, SamplingParams  # noqa: E402
from gpu_runtime.kernels.backend import Kernels, select_backend  # noqa: E402
from gpu_runtime.kernels.batch import BatchRow, ForwardBatch, build_batch  # noqa: E402
from gpu_runtime.kernels.sample import SampleRow, sample  # noqa: E402
from gpu_runtime.memory.layout import PageLayout  # noqa: E402
from gpu_runtime.memory.pages import PagePool  # noqa: E402
from gpu_runtime.memory.plan import Site, plan_adapter  # noqa: E402
from gpu_runtime.memory.tables import SlotTables  # noqa: E402
from gpu_runtime.models.causal_lm import CausalLM  # noqa: E402
from gpu_runtime.models.spec import ModelSpec  # noqa: E402
from gpu_runtime.models.weights import load_weights  # noqa: E402


class Bench:
    """The model over a pool that holds `num_adapters` random adapters and the KV of as many requests."""

    def __init__(self, model_dir: Path, *, kernels: Kernels, num_adapters: int, rank: int, dtype: torch.dtype, context: int) -> None:
        self.spec = spec = ModelSpec.from_config(json.loads((model_dir / "config.json").read_text()))
        self.layout = PageLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim)
        sites = [Site(layer, target, rank, *spec.target_shape(target)) for layer in range(spec.num_layers) for target in TARGETS]
        plan = plan_adapter(self.layout, sites, dtype.itemsize)
        self.adapter_bytes = plan.weight_bytes
        kv_pages = self.layout.pages_for(context + 1)
        self.pool = PagePool(num_pages=num_adapters * (plan.num_pages + kv_pages), page_bytes=self.layout.page_bytes)
        self.tables = SlotTables(num_slots=num_adapters, num_layers=spec.num_layers, max_rank=rank)
        for slot in range(num_adapters):
            pages = self.pool.allocate(plan.num_pages, owner=f"adapter {slot}")
            for page in pages:
                self.pool.data[page] = (torch.randn(self.layout.page_bytes // dtype.itemsize) * 0.01).to(dtype).view(torch.uint8)
            self.tables.install(slot, plan, pages, [1.0] * len(sites), dtype)
        self.kv = [self.pool.allocate(kv_pages, owner=f"request {index}") for index in range(num_adapters)]
        for pages in self.kv:
            self.pool.data[pages] = 0
        self.model = CausalLM(
            spec, weights=load_weights(model_dir, spec=spec), kernels=kernels, pool=self.pool, layout=self.layout, tables=self.tables
        )

    def batch(self, size: int, *, context: int, adapters: bool) -> ForwardBatch:
        rows = [BatchRow([100 + index], context, self.kv[index], index if adapters else NO_SLOT) for index in range(size)]
        return build_batch(rows, tokens_per_page=self.layout.tokens_per_page)

    def weight_bytes(self) -> int:
        """Of every matrix that a step reads once."""
        return 4 * self.num_weights()

    def num_weights(self) -> int:
        layer = sum(num_in * num_out for num_in, num_out in map(self.spec.target_shape, TARGETS))
        return self.spec.num_layers * layer + self.spec.vocab_size * self.spec.hidden_size


def fastest_ms(call: Callable[[], object], *, repeats: int) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def bandwidth(kernels: Kernels) -> float:
    """Bytes a second that the backend reads of a matrix which no cache holds, for one token."""
    weight = kernels.pack(torch.randn(65536, 1024))
    x = torch.randn(1, 1024)
    return 65536 * 1024 * 4 / (1e-3 * fastest_ms(lambda: kernels.linear(x, weight=weight), repeats=7))


def flops(kernels: Kernels) -> float:
    """FLOPs a second of the backend's product where its operands stay in cache."""
    weight, x = kernels.pack(torch.randn(1024, 512)), torch.randn(256, 512)
    return 2 * 256 * 1024 * 512 / (1e-3 * fastest_ms(lambda: kernels.linear(x, weight=weight), repeats=15))


def measure(bench: Bench, *, size: int, context: int, repeats: int, kernels: Kernels, rates: tuple[float, float]) -> dict[str, float]:
    base, mixed = (bench.batch(size, context=context, adapters=adapters) for adapters in (False, True))
    rows = [SampleRow(SamplingParams(temperature=0), index, context) for index in range(size)]
    logits = bench.model.forward(base)
    head, h = kernels.pack(torch.zeros(bench.spec.vocab_size, bench.spec.hidden_size)), torch.randn(size, bench.spec.hidden_size)
    bytes_s, flops_s = rates
    kv_bytes = size * context * bench.layout.token_bytes
    floor_s = max((bench.weight_bytes() + kv_bytes) / bytes_s, 2 * size * bench.num_weights() / flops_s)
    return {
        "batch": size,
        "base_ms": fastest_ms(lambda: bench.model.forward(base), repeats=repeats),
        "adapter_ms": fastest_ms(lambda: bench.model.forward(mixed), repeats=repeats),
        "logits_ms": fastest_ms(lambda: kernels.linear(h, weight=head), repeats=repeats),
        "sample_ms": fastest_ms(lambda: sample(logits, rows), repeats=repeats),
        "floor_ms": 1e3 * floor_s,
        "adapter_floor_ms": 1e3 * (floor_s + size * bench.adapter_bytes / bytes_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/smollm2-135m-instruct")
    parser.add_argument("--batches", default="1,4,8,16,32")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--reference", action="store_true", help="measure the plain-torch backend")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kernels = select_backend(threads=arguments.threads, reference=arguments.reference)
    sizes = [int(size) for size in arguments.batches.split(",")]
    bench = Bench(
        arguments.model,
        kernels=kernels,
        num_adapters=max(sizes),
        rank=arguments.rank,
        dtype=getattr(torch, arguments.dtype),
        context=arguments.context,
    )
    rates = bandwidth(kernels), flops(kernels)
    print(json.dumps({"load": os.getloadavg()[0], "GB/s": round(rates[0] / 1e9, 1), "GFLOP/s": round(rates[1] / 1e9)}))
    for size in sizes:
        row = measure(bench, size=size, context=arguments.context, repeats=arguments.repeats, kernels=kernels, rates=rates)
        print(json.dumps({name: round(value, 1) for name, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()
