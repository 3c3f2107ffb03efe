"""Adapters on every linear of every architecture, through the engine: tokens and logits against PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.config import RuntimeConfig
from gpu_runtime.engine.build import build_engine
from tests.runtime.engine.rig import PeftOracle, Rig, require_parity, write_adapter
from tests.runtime.models.test_causal_lm import GEMMA3, random_prompts
from tests.tiny import make_tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral", "sliding_window": 24},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "gemma3": GEMMA3,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_peft(tmp_path: Path, family: str) -> None:
    """Two adapters (stored in another dtype than the base) and the base, prompts longer than a step and than a window."""
    model_dir = make_tiny_model(tmp_path / "base", vector_noise=0.3, **FAMILIES[family])
    _require_peft_parity(model_dir, tmp_path, oracle_dir=model_dir)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_base_weights_in_half_precision(tmp_path: Path, dtype: str) -> None:
    """Beside an oracle in float32 whose matrices were rounded once: the same tolerance holds, as no sum is narrower."""
    model_dir = make_tiny_model(tmp_path / "base", vector_noise=0.3, **GEMMA3)
    rounded = shutil.copytree(model_dir, tmp_path / "rounded")
    tensors = load_file(model_dir / "model.safetensors")
    narrow = {name: tensor.to(getattr(torch, dtype)).float() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    assert any(not narrow[name].equal(tensors[name]) for name in narrow)
    save_file(narrow, rounded / "model.safetensors", metadata={"format": "pt"})
    _require_peft_parity(model_dir, tmp_path, oracle_dir=rounded, dtype=dtype)


def test_gemmas_activations_are_kept_out_of_float16_on_a_gpu(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path / "base", **GEMMA3)
    config = RuntimeConfig(model_dir, device="cuda", dtype="float16")
    with pytest.raises(ValueError, match=r"dtype is 'float16'.*choose bfloat16"):
        build_engine(config, LocalSource(base_digest="b" * 64))


def _require_peft_parity(model_dir: Path, tmp_path: Path, *, oracle_dir: Path, **settings: Any) -> None:
    folders = [write_adapter(tmp_path / str(rank), model_dir, rank=rank, dtype=torch.bfloat16, seed=rank) for rank in (3, 8)]
    rig = Rig.build(model_dir, max_step_tokens=24, pool_pages=96, **settings)
    adapters = [None, *folders]
    keys = [folder and rig.source.add(folder, tenant="t") for folder in adapters]
    prompts = random_prompts(384, [50, 9, 31, 70, 3, 17])
    for at, prompt in enumerate(prompts):
        rig.add(f"p{at}", prompt, adapter=keys[at % 3], seed=at, max_tokens=6)
    rig.run()
    rig.close()
    oracle, num_tokens = PeftOracle(oracle_dir), 0
    for which, folder in enumerate(adapters):  # PEFT wraps the model at its first adapter: the base goes first
        for at in range(which, len(prompts), 3):
            want = require_parity(oracle, prompts[at], rig.tokens(f"p{at}"), adapter=folder)
            got = [rig.recorder.seen[at, len(prompts[at]) + position] for position in range(len(want))]
            torch.testing.assert_close(torch.stack(got), want, rtol=0, atol=1e-3)
            num_tokens += len(want)
    assert num_tokens > 30, "ties left too little to compare"
