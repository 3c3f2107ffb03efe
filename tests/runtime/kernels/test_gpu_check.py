"""`make gpu-check` without a GPU: it says so; its comparisons hold under the interpreter and can fail; its rivals are right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench.gpu.check import correctness, error_of_delta
from tests.bench.gpu.world import World, one_hot_einsum, padded_bmm
from tests.runtime.conftest import kernels_named

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.bench.gpu.check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "no GPU here: torch sees no CUDA device, so there is nothing to check\n")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_its_comparisons_hold_and_can_fail() -> None:
    kernels = kernels_named("gpu")
    rows = correctness(kernels, device="cpu", shapes={"small": (64, 48)}, ranks=(8,), dtype=torch.float32)
    assert [row.verdict() for row in rows] == ["holds"] * 3, [row.line() for row in rows]
    world = World(in_features=64, out_features=48, num_adapters=2, rank=4, device="cpu", dtype=torch.float32)
    right = world.oracle
    world.oracle = lambda y, x, batch: right(y, x, batch) + 0.1  # type: ignore[method-assign]
    assert error_of_delta(kernels, world, [(1, 1), (1, 0)]) > 1


def test_the_rivals_compute_the_same() -> None:
    world = World(in_features=64, out_features=48, num_adapters=3, rank=4, device="cpu")
    batch = world.batch([(1, 2), (1, 0), (1, 2)])
    y, x = world.inputs(3)
    expected, (a, b) = world.oracle(y, x, batch), world.stacks()
    slots = batch.slots.long()
    for rival, chosen in ((padded_bmm, slots), (one_hot_einsum, torch.nn.functional.one_hot(slots, 3).to(x.dtype))):
        found = y.clone()
        rival(found, x, a, b, chosen)
        assert torch.allclose(found.double(), expected, atol=0.05)
