"""DESIGN 4, neighbours on a small machine: a training process at nice 10 with one thread slows a step down to a third at the worst.

The training process is stopped and continued by signals, so windows with and without it alternate within a second and see the
same machine. The median over the windows decides; a machine that others keep busy gets more windows.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.config import RuntimeConfig
from gpu_runtime.core import Request, SamplingParams
from gpu_runtime.engine.build import build_engine
from gpu_runtime.engine.engine import Engine

MAX_RATIO = 3.0
WINDOW_STEPS, WINDOWS, MAX_ROUNDS = 6, 5, 4

TRAINING = """
import os
import torch
os.nice(10)
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(6)])
optimiser = torch.optim.AdamW(model.parameters())
print("ready", flush=True)
while True:
    optimiser.zero_grad()
    model(torch.randn(64, 512)).square().mean().backward()
    optimiser.step()
"""


@contextmanager
def training() -> Iterator[subprocess.Popen[str]]:
    """As the supervisor starts workers: nice 10, one thread, nobody spins."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen([sys.executable, "-c", TRAINING], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def window_s(engine: Engine) -> float:
    """The median step of one window."""
    times = []
    for _ in range(WINDOW_STEPS):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def ratio(engine: Engine, neighbour: subprocess.Popen[str]) -> float:
    beside, alone = [], []
    for _ in range(WINDOWS):
        for times, what in ((alone, signal.SIGSTOP), (beside, signal.SIGCONT)):
            neighbour.send_signal(what)
            times.append(window_s(engine))
    return statistics.median(beside) / statistics.median(alone)


@pytest.mark.model
def test_training_beside_it_slows_a_step_down_threefold_at_the_worst(base_model_dir: Path) -> None:
    config = RuntimeConfig(base_model_dir, pool_bytes=256 << 20, max_batch_requests=4, max_model_len=1024)
    engine = build_engine(config, LocalSource(base_digest="b" * 64))
    params = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    for number in range(4):
        engine.add_request(Request(f"r{number}", (1, 2, 3 + number), params, None, arrived_s=0.0))
    engine.step()
    with training() as neighbour:
        found: list[float] = []
        while not found or (found[-1] > MAX_RATIO and len(found) < MAX_ROUNDS):
            found.append(ratio(engine, neighbour))
    engine.close()
    assert found[-1] <= MAX_RATIO, f"a step takes {', '.join(f'{one:.1f}' for one in found)} times as long beside a training process"
