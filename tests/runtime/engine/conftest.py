"""One tiny model and a few adapters for all tests of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runtime.engine.rig import PeftOracle, write_adapter
from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> list[Path]:
    """Mixed ranks, targets, layers and dtypes."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(root / "a", model_dir, rank=4, seed=1),
        write_adapter(root / "b", model_dir, rank=16, seed=2, targets=("q_proj", "v_proj"), dtype=torch.bfloat16),
        write_adapter(root / "c", model_dir, rank=33, seed=3, targets=("o_proj", "gate_proj", "down_proj"), dtype=torch.float16),
        write_adapter(root / "d", model_dir, rank=7, seed=4, layers=[1]),
    ]


@pytest.fixture(scope="session")
def oracle(model_dir: Path) -> PeftOracle:
    return PeftOracle(model_dir)
