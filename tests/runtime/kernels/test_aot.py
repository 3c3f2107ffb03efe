"""What ptxas makes of every Triton kernel for GPUs that are not here: registers, shared memory, spills, width of loads.

The table is a fence, not a target: a kernel that grows past it lost occupancy, spilled, or reads the pool piecemeal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OLDEST = "3.6.0"  # the oldest Triton that the runtime promises to work with


@dataclass(frozen=True)
class Fence:
    """The most registers a thread and bytes of shared memory a block; the least bytes of the widest load."""

    registers: int
    shared: int
    widest: int = 16


FENCES = {
    "shrink_row": Fence(96, 1024),
    "shrink_chunk": Fence(128, 32 * 1024),
    "expand_row": Fence(64, 8 * 1024),
    "expand_chunk": Fence(200, 36 * 1024),
    "merge": Fence(168, 32 * 1024),
    "attend_split": Fence(168, 24 * 1024),
    "attend_split_256": Fence(176, 44 * 1024),
    "attend_prompt_256": Fence(168, 56 * 1024),
    "join_splits": Fence(40, 0, widest=4),
    "attend_prompt": Fence(168, 32 * 1024),
    "rope_kv_write": Fence(40, 0, widest=4),
    "rms_norm": Fence(72, 64),
    "silu_mul": Fence(40, 0),
    "gelu_mul": Fence(40, 0),
}


def compiled(tmp_path: Path, *capabilities: int, path: str = "") -> list[dict[str, int | str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT))))}
    command = [sys.executable, "-m", "tests.runtime.kernels.aot", *map(str, capabilities)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold(lines: list[dict[str, int | str]], *, kernels: int) -> None:
    assert len(lines) == kernels
    over = [line for line in lines if not _inside(line)]
    assert not over, f"outside the table: {over}"


def _inside(line: dict[str, int | str]) -> bool:
    fence = FENCES[str(line["kernel"])]
    small = int(line["registers"]) <= fence.registers and int(line["shared"]) <= fence.shared and line["spills"] == 0
    return small and int(line["widest"]) >= fence.widest and line["scalar"] == 0


def test_kernels_compile_within_the_table_for_ampere_and_hopper(tmp_path: Path) -> None:
    hold(compiled(tmp_path, 80, 90), kernels=2 * len(FENCES))


def test_the_table_refuses_a_spill_and_a_scalar_load() -> None:
    good: dict[str, int | str] = {"kernel": "shrink_row", "registers": 80, "shared": 512, "spills": 0, "widest": 16, "scalar": 0}
    assert _inside(good)
    for worse in ({"spills": 8}, {"scalar": 1}, {"registers": 97}, {"shared": 2048}, {"widest": 8}):
        assert not _inside(good | worse), worse


@pytest.mark.full
def test_kernels_compile_with_the_oldest_triton_too(tmp_path: Path) -> None:
    """Registers and spills are the newer compiler's business; here it must compile, without scalar loads."""
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), f"triton=={OLDEST}"]
    subprocess.run(install, check=True, capture_output=True)
    lines = compiled(tmp_path, 80, 90, path=str(place))
    assert {line["kernel"] for line in lines} == set(FENCES)
    assert all(line["scalar"] == 0 for line in lines)
