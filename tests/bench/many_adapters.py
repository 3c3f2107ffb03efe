"""`python -m tests.bench.many_adapters`: throughput with 2000 adapters over that with 5, on the real engine and base model.

r8 q, k, v, o bf16 adapters, uniform popularity, prompts and outputs uniform over [8, 64] tokens, the same requests for both.
The pool has the pages of NUM_HELD adapters and of the KV of a full batch. All adapters lie on the host beforehand, as in
S-LoRA, so what is measured is the pool: loads and evictions between steps. An adapter's identity is (tenant, form digest),
so 2000 of them are 8 forms under 250 tenants: nothing of them is shared anywhere.

Two engines take steps in turn in one process, so that what else the machine does falls on both alike. The floor is 1: the
same steps without a load.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.config import RuntimeConfig
from gpu_runtime.core import AdapterKey, Request, SamplingParams
from gpu_runtime.engine.build import build_engine, page_layout
from gpu_runtime.engine.engine import Engine
from gpu_runtime.memory.plan import Site, plan_adapter
from gpu_runtime.models.spec import ModelSpec
from registry.artifact.base import BaseSpec
from tests.bench.rows import Row, finish
from tests.generate import write_adapter

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".cache/models/smollm2-135m-instruct"
BAR = 0.95
NUM_FORMS, NUM_MANY, NUM_FEW, NUM_HELD = 8, 2000, 5, 40
BATCH, LENGTHS, RANK = 16, (8, 64), 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Sizes:
    """What must have happened for the row to mean something."""

    num_requests: int
    num_distinct: int
    num_evictions: int


FULL, SHORT = Sizes(600, 400, 300), Sizes(100, 90, 20)


class Side:
    """One engine, its requests, and the seconds that its steps have taken."""

    def __init__(self, folders: Sequence[Path], *, num_adapters: int, num_requests: int) -> None:
        source = LocalSource(base_digest="b" * 64)
        rng = random.Random(42)
        chosen = [rng.randrange(num_adapters) for _ in range(num_requests)]
        keys = {at: source.add(folders[at % NUM_FORMS], tenant=f"t{at // NUM_FORMS}") for at in sorted(set(chosen))}
        self.num_distinct = len(keys)
        self.engine = build_engine(_config(), source)
        self.seconds = 0.0
        self.num_tokens = 0
        _bring(self.engine, list(keys.values()))
        for at, adapter in enumerate(chosen):
            self.engine.add_request(_request(at, keys[adapter]))

    def step(self) -> None:
        started = time.perf_counter()
        outputs = self.engine.step()
        self.seconds += time.perf_counter() - started
        failed = next((output.error for output in outputs if output.error is not None), None)
        assert failed is None, failed
        self.num_tokens += len(outputs)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def _config() -> RuntimeConfig:
    """A pool of NUM_HELD adapters and the KV of a full batch; every adapter of the trace fits the host tier."""
    raw = json.loads((MODEL / "config.json").read_text())
    spec = ModelSpec.from_config(raw)
    layout = page_layout(spec, dtype=torch.float32)
    sites = [Site(layer, target, RANK, *spec.target_shape(target)) for layer in range(spec.num_layers) for target in TARGETS]
    num_pages = NUM_HELD * plan_adapter(layout, sites, 2).num_pages + BATCH * layout.pages_for(2 * LENGTHS[1] + 1)
    pool_bytes = num_pages * layout.page_bytes
    return RuntimeConfig(
        MODEL, pool_bytes=pool_bytes, max_batch_requests=BATCH, num_slots=128, max_rank=RANK, host_cache_bytes=4 << 30, merge_share=0.0
    )


def _request(at: int, key: AdapterKey) -> Request:
    """The same for the same `at`, whoever serves it."""
    rng = random.Random(at)
    num_prompt, num_output = rng.randint(*LENGTHS), rng.randint(*LENGTHS)
    prompt = tuple(rng.randrange(1000, 40000) for _ in range(num_prompt))
    return Request(f"r{at}", prompt, SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True), key, arrived_s=0.0)


def _bring(engine: Engine, keys: Sequence[AdapterKey]) -> None:
    """All adapters to the host, none to the pool."""
    for key in keys:
        engine.residency.want(key, grant=None)
    while not all(engine.residency.is_ready(key) for key in keys):
        assert not engine.residency.poll(), "an adapter could not be read"
        time.sleep(0.01)
    for key in keys:
        engine.residency.unwant(key)


def measure(folder: Path, sizes: Sizes) -> tuple[Side, Side]:
    """(many, few) after serving the same requests, a step of each in turn."""
    base = BaseSpec.from_config(json.loads((MODEL / "config.json").read_text()))
    folders = [
        write_adapter(folder / f"a{seed}", base, rank=RANK, targets=TARGETS, dtype="BF16", seed=seed, scale=0.02)
        for seed in range(NUM_FORMS)
    ]
    many, few = (Side(folders, num_adapters=num, num_requests=sizes.num_requests) for num in (NUM_MANY, NUM_FEW))
    while many.engine.has_work or few.engine.has_work:
        for side in (many, few):
            if side.engine.has_work:
                side.step()
    assert many.num_tokens == few.num_tokens, "the two served different work"
    counts = many.engine.state().counts
    assert many.num_distinct >= sizes.num_distinct, f"{many.num_distinct} distinct adapters: too few"
    assert counts.num_evictions >= sizes.num_evictions, f"{counts.num_evictions} evictions: too few"
    for side in (many, few):
        side.engine.close()
        side.engine.check_integrity()
    return many, few


def rows(*, short: bool) -> list[Row]:
    sizes = SHORT if short else FULL
    with tempfile.TemporaryDirectory() as folder:
        many, few = measure(Path(folder), sizes)
    counts = many.engine.state().counts
    detail = (
        f"{many.tokens_per_s:.0f} / {few.tokens_per_s:.0f} tok/s, {sizes.num_requests} requests, {many.num_distinct} distinct adapters, "
        f"{counts.num_loads} loads in {counts.load_s:.1f} of {many.seconds:.0f} s, {counts.num_evictions} evictions"
    )
    ratio = many.tokens_per_s / few.tokens_per_s
    return [Row("throughput n=2000 / n=5", ratio, BAR, "python -m tests.bench.many_adapters", floor=1.0, detail=detail)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{SHORT.num_requests} requests: a glance, not the row")
    finish(rows(short=parser.parse_args().short))


if __name__ == "__main__":
    main()
