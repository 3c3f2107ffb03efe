"""Measures what `policy_replay` replays with: seconds of a step of the real model, and of a merge, into `step_table.json`.

Usage: python -m tests.bench.step_table [--out tests/bench/step_table.json] [--repeats 5] [--fresh]

SmolLM2-135M, adapters of rank 16 on all linears in bf16. `base_s`, `one_s`: by tokens in the step (up to 16: a decode step of as many
requests; above: one prompt chunk), on the base or merged weights, and with one adapter. `distinct_s`: 16 decoding requests, by
distinct adapters. `merge_s`: writing the merged copy of every matrix. Each is the fastest of --repeats, taken in turn, and of what the
file holds from runs before (`runs`), so that a busy machine is met by measuring more; `--fresh` forgets those.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_runtime.core import NO_SLOT
from gpu_runtime.kernels.backend import Kernels, select_backend
from gpu_runtime.kernels.batch import BatchRow, ForwardBatch, build_batch
from tests.bench.step_time import ROOT, Bench

DECODES = (1, 2, 4, 8, 16)
PROMPTS = (64, 128, 256, 512)
CONTEXT = 256
PATH = Path(__file__).with_name("step_table.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fresh", action="store_true", help="forget the runs before")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kernels = select_backend()
    bench = Bench(arguments.model, kernels=kernels, num_adapters=16, rank=16, dtype=torch.bfloat16, context=512)
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() and not arguments.fresh else {}
    measured = measure(bench, kernels, repeats=arguments.repeats)
    table = {
        "command": "python -m tests.bench.step_table",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load": round(os.getloadavg()[0], 1),
        "model": "SmolLM2-135M-Instruct, fp32; adapters rank 16, all linears, bf16",
        "runs": before.get("runs", 0) + 1,
        **{name: _faster(value, before.get(name)) for name, value in measured.items()},
    }
    arguments.out.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table))


def _faster(now: Any, before: Any) -> Any:
    if before is None:
        return now
    return {size: min(value, before[str(size)]) for size, value in now.items()} if isinstance(now, dict) else min(now, before)


def measure(bench: Bench, kernels: Kernels, *, repeats: int) -> dict[str, Any]:
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for size in (*DECODES, *PROMPTS):
        for name, slots in (("base_s", [NO_SLOT] * 16), ("one_s", [0] * 16)):
            batch = _decode(bench, slots[:size]) if size <= 16 else _prompt(bench, size, slots[0])
            calls[name, size] = lambda batch=batch: bench.model.forward(batch)  # type: ignore[misc]
    for distinct in DECODES:
        batch = _decode(bench, [row % distinct for row in range(16)])
        calls["distinct_s", distinct] = lambda batch=batch: bench.model.forward(batch)  # type: ignore[misc]
    outs = {one.weight.data.shape: torch.empty_like(one.weight.data) for one in bench.model.decoder.matrices}
    calls["merge_s", 0] = lambda: _merge(bench, kernels, outs)
    best = _fastest_s(calls, repeats=repeats)
    table: dict[str, Any] = {
        name: {size: round(best[name, size], 6) for key, size in calls if key == name} for name in ("base_s", "one_s", "distinct_s")
    }
    return table | {"merge_s": round(best["merge_s", 0], 6)}


def _fastest_s(calls: dict[tuple[str, int], Callable[[], object]], *, repeats: int) -> dict[tuple[str, int], float]:
    """In turn, so that a busy moment of the machine meets all alike."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _decode(bench: Bench, slots: list[int]) -> ForwardBatch:
    rows = [BatchRow([100 + at], CONTEXT, bench.kv[at], slot) for at, slot in enumerate(slots)]
    return build_batch(rows, tokens_per_page=bench.layout.tokens_per_page)


def _prompt(bench: Bench, size: int, slot: int) -> ForwardBatch:
    return build_batch([BatchRow([100] * size, 0, bench.kv[0], slot)], tokens_per_page=bench.layout.tokens_per_page)


def _merge(bench: Bench, kernels: Kernels, outs: dict[torch.Size, torch.Tensor]) -> None:
    for one in bench.model.decoder.matrices:
        kernels.merge(
            outs[one.weight.data.shape],
            weight=one.weight,
            pool=bench.pool.data,
            tables=bench.tables,
            slot=0,
            layer=one.layer,
            sites=one.sites,
        )


if __name__ == "__main__":
    main()
