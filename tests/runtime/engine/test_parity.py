"""The issue's parity criterion on the real base model: 64 prompts, 8 adapters and the base, mixed batches, a pool too small for all.

Greedy tokens and logits equal transformers + PEFT in fp32, one prompt at a time. Tie rule: where the oracle's two best
logits differ by less than 1e-4 either token is right, and the comparison of that prompt ends there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.artifact.base import BaseSpec
from tests.generate import generate_adapter
from tests.runtime.engine.rig import PeftOracle, Rig, require_parity

REAL = Path(__file__).resolve().parents[2] / "data" / "adapters"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GENERATED: dict[str, dict[str, Any]] = {
    "attention-8-f32": {"rank": 8, "targets": ATTENTION, "dtype": "F32"},
    "all-16-bf16": {"rank": 16, "targets": (*ATTENTION, *MLP), "dtype": "BF16"},
    "qv-64-f16": {"rank": 64, "targets": ("q_proj", "v_proj"), "dtype": "F16", "rslora": True, "alpha": 8},
    "mlp-24-f32": {"rank": 24, "targets": MLP, "dtype": "F32", "layers": range(0, 30, 2), "layers_to_transform": list(range(0, 30, 2))},
    "down-o-33-bf16": {"rank": 33, "targets": ("o_proj", "down_proj"), "dtype": "BF16"},
    "patterns-f16": {
        "rank": 12,
        "targets": ("k_proj", "up_proj"),
        "dtype": "F16",
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"k_proj": 40},
    },
}
SUBJECTS = ["the sea", "an old map", "seven dogs", "a cold winter", "the number two", "my neighbour", "green tea", "a broken clock"]
OPENINGS = [
    "Tell me about {}",
    "Once there was {}, and",
    "What is {}?",
    "Name: {}\nAge:",
    "{} is",
    "Write one line on {}.",
    "Why {}?",
    "I saw {}",
]
PROMPTS = [opening.format(subject) for opening in OPENINGS for subject in SUBJECTS]
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def adapters(base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    """The base model alone, the two real adapters that the repository carries, and six generated ones."""
    root = tmp_path_factory.mktemp("parity")
    base = BaseSpec.from_config(json.loads((base_model_dir / "config.json").read_text()))
    generated = [
        generate_adapter(base, seed=at, scale=0.04, **options).write(root / name) for at, (name, options) in enumerate(GENERATED.items())
    ]
    return [None, REAL / "pirate", REAL / "json", *generated]


@pytest.fixture(scope="module")
def prompts(base_model_dir: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.mark.model
def test_64_prompts_over_8_adapters_and_the_base(
    base_model_dir: Path, adapters: list[Path | None], prompts: list[list[int]], tmp_path: Path
) -> None:
    rig = Rig.build(
        base_model_dir,
        pool_pages=48,
        num_slots=8,
        max_batch_requests=16,
        max_step_tokens=96,
        host_cache_bytes=60 * 2**20,
        disk_cache_dir=tmp_path / "disk",
        threads=0,
    )
    rig.checks_steps = False
    keys = [folder and rig.source.add(folder, tenant="t") for folder in adapters]
    for at, prompt in enumerate(prompts):
        rig.add(f"p{at}", prompt, adapter=keys[at % len(keys)], seed=at, max_tokens=MAX_TOKENS)
    rig.run(limit_s=240)
    rig.close()
    assert rig.engine.residency.num_evictions >= 4
    oracle = PeftOracle(base_model_dir)
    bare = {which: oracle.logits(prompts[which], adapter=None)[-1] for which in range(len(adapters))}
    num_tokens = 0
    for which, folder in enumerate(adapters):
        changed = rig.recorder.seen[which, len(prompts[which])] - bare[which]
        assert (float(changed.abs().max()) > 0.5) == (folder is not None), f"{folder} changes too little to be a test"
        for at in range(which, len(prompts), len(adapters)):
            tokens = rig.tokens(f"p{at}")
            assert len(tokens) == MAX_TOKENS
            want = require_parity(oracle, prompts[at], tokens, adapter=folder)
            got = torch.stack([rig.recorder.seen[at, len(prompts[at]) + position] for position in range(len(want))])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
            num_tokens += len(want)
    assert num_tokens > 0.97 * len(prompts) * MAX_TOKENS, "ties left too little to compare"
