"""Shapes and base digest: the same model is the same on any machine, in any spelling and under any sharding."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.artifact.base import TARGETS, BaseSpec, compute_base_digest
from registry.artifact.base_config import CONFIG_SUBSET, settings
from registry.artifact.errors import ArtifactRefused
from tests.generate import TINY_CONFIG, safetensors_bytes

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 0, "content": "<s>"}],
    "model": {"type": "BPE", "vocab": {"<s>": 0, "Ä": 1, "b": 2, "Äb": 3}, "merges": [["Ä", "b"]]},
}
TENSORS = {f"model.layers.{n}.weight": np.arange(12, dtype=np.float32).reshape(3, 4) + n for n in range(4)}
TINY_DIGEST = "b0ce89c4c76ca25535eb6f15fc33267000d8bc66bf0bef70fff28756bd3398b9"
REAL_DIGEST = "6746cb96db4bc438e1d0f538ec75b3d076b873721ee8152d8dc5672d6ced7e42"


def write_model(
    folder: Path,
    *,
    config: Mapping[str, Any] = TINY_CONFIG,
    tokenizer: Mapping[str, Any] = TOKENIZER,
    shards: list[dict[str, np.ndarray]] | None = None,
    dtype: str = "F32",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for number, tensors in enumerate([TENSORS] if shards is None else shards):
        (folder / f"model-{number}.safetensors").write_bytes(safetensors_bytes(tensors, dtype=dtype))
    return folder


def test_golden_digest(tmp_path: Path) -> None:
    assert compute_base_digest(write_model(tmp_path)) == TINY_DIGEST


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in TINY_CONFIG.items() if key != name}


SAME: dict[str, Callable[[Path], Path]] = {
    "four shards": lambda folder: write_model(folder, shards=[{name: value} for name, value in TENSORS.items()]),
    "two shards, backwards": lambda folder: write_model(
        folder, shards=[dict(list(reversed(TENSORS.items()))[:1]), dict(list(TENSORS.items())[:3])]
    ),
    "other order of keys": lambda folder: write_model(
        folder, config=dict(reversed(TINY_CONFIG.items())), tokenizer=dict(reversed(TOKENIZER.items()))
    ),
    "idle keys": lambda folder: write_model(
        folder, config=TINY_CONFIG | {"transformers_version": "9", "dtype": "float32", "use_cache": True, "bos_token_id": 1}
    ),
    "rope_parameters of transformers 5": lambda folder: write_model(
        folder, config=without("rope_theta") | {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}
    ),
    "rope_theta left to its default": lambda folder: write_model(folder, config=without("rope_theta")),
    "rope_scaling null": lambda folder: write_model(folder, config=TINY_CONFIG | {"rope_scaling": None}),
    "rms_norm_eps after a GGUF": lambda folder: write_model(folder, config=TINY_CONFIG | {"rms_norm_eps": 9.999999747378752e-06}),
    "head_dim left out": lambda folder: write_model(folder, config=without("head_dim")),
    "defaults written out": lambda folder: write_model(
        folder, config=TINY_CONFIG | {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    ),
    "padding in the tokenizer": lambda folder: write_model(
        folder, tokenizer=TOKENIZER | {"padding": {"length": 8}, "truncation": {"max_length": 9}}
    ),
    "merges as strings": lambda folder: write_model(folder, tokenizer=TOKENIZER | {"model": TOKENIZER["model"] | {"merges": ["Ä b"]}}),
    "other files beside": lambda folder: (write_model(folder) / "README.md").write_text("x") and folder,
}  # type: ignore[dict-item]

OTHER: dict[str, Callable[[Path], Path]] = {
    "one value": lambda folder: write_model(folder, shards=[TENSORS | {"model.layers.0.weight": TENSORS["model.layers.0.weight"] + 1e-6}]),
    "one name": lambda folder: write_model(folder, shards=[TENSORS | {"more": np.ones(1, np.float32)}]),
    "one shape": lambda folder: write_model(
        folder, shards=[TENSORS | {"model.layers.0.weight": TENSORS["model.layers.0.weight"].reshape(4, 3)}]
    ),
    "names swapped": lambda folder: write_model(folder, shards=[dict(zip(TENSORS, reversed(TENSORS.values()), strict=True))]),
    "dtype": lambda folder: write_model(folder, dtype="F16"),
    "vocabulary": lambda folder: write_model(folder, tokenizer=TOKENIZER | {"added_tokens": []}),
    "merges": lambda folder: write_model(folder, tokenizer=TOKENIZER | {"model": TOKENIZER["model"] | {"merges": []}}),
    "rope_theta": lambda folder: write_model(folder, config=TINY_CONFIG | {"rope_theta": 10001.0}),
    "rope_scaling": lambda folder: write_model(folder, config=TINY_CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "rms_norm_eps": lambda folder: write_model(folder, config=TINY_CONFIG | {"rms_norm_eps": 1e-6}),
    "tied": lambda folder: write_model(folder, config=TINY_CONFIG | {"tie_word_embeddings": False}),
    "heads": lambda folder: write_model(folder, config=TINY_CONFIG | {"num_key_value_heads": 4}),
}


@pytest.mark.parametrize("write", SAME.values(), ids=SAME)
def test_the_same_model(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert compute_base_digest(write(tmp_path)) == TINY_DIGEST


def test_other_models_all_differ(tmp_path: Path) -> None:
    digests = {name: compute_base_digest(write(tmp_path / name)) for name, write in OTHER.items()}
    assert len({TINY_DIGEST, *digests.values()}) == len(OTHER) + 1


def test_old_and_new_spelling_of_scaled_rope() -> None:
    old = TINY_CONFIG | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8}}
    new = without("rope_theta") | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000, "factor": 8.0}}
    assert settings(old) == settings(new)


GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
}


def test_old_and_new_spelling_of_gemma() -> None:
    old = GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    rope = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    assert settings(old) == settings(GEMMA | {"rope_parameters": rope, "layer_types": kinds})
    assert settings({"model_type": "gemma3", "text_config": old}) == settings(old)


def test_a_window_that_is_switched_off_does_not_count() -> None:
    qwen = TINY_CONFIG | {"model_type": "qwen2", "use_sliding_window": False}
    assert settings(qwen | {"sliding_window": 32768, "max_window_layers": 21}) == settings(qwen | {"sliding_window": None})
    mistral = TINY_CONFIG | {"model_type": "mistral"}
    assert settings(mistral | {"sliding_window": None}) != settings(mistral)


def test_settings_cover_the_documented_subset() -> None:
    assert set(settings(TINY_CONFIG)) == set(settings(GEMMA)) == CONFIG_SUBSET


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_shapes_are_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        key: TINY_CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    config = transformers.AutoConfig.for_model(family, **sizes, num_key_value_heads=2, head_dim=24)
    model = transformers.AutoModelForCausalLM.from_config(config)
    saved = json.loads(config.to_json_string(use_diff=True))
    spec = BaseSpec.from_config(saved)
    linears = {name: module for name, module in model.named_modules() if name.endswith(TARGETS)}
    assert len(linears) == 7 * spec.num_layers
    for name, module in linears.items():
        assert spec.targets[name.rsplit(".", 1)[1]] == (module.in_features, module.out_features)
    assert settings(saved) == settings(config.to_dict())


def test_spec_there_and_back() -> None:
    spec = BaseSpec.from_config(TINY_CONFIG)
    again = BaseSpec.from_json(json.loads(json.dumps(spec.to_json(), sort_keys=True)))
    assert again == spec
    assert list(again.targets) == list(TARGETS)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", None, ["llama"]])
def test_families_that_are_not_served(family: object) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        BaseSpec.from_config(TINY_CONFIG | {"model_type": family})
    assert refused.value.code == "unsupported_base_model"


BAD_CONFIGS: list[dict[str, Any]] = [
    {"hidden_size": None},
    {"hidden_size": "64"},
    {"hidden_size": 0},
    {"hidden_size": True},
    {"num_hidden_layers": 10**6},
    {"num_key_value_heads": 3},
    {"rms_norm_eps": 1e300},
    {"rope_parameters": [1]},
    {"rope_scaling": "linear"},
]


@pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
def test_configs_that_cannot_be(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        compute_base_digest(write_model(tmp_path, config=TINY_CONFIG | changes))
    assert refused.value.code == "bad_base_model"
    assert refused.value.field in changes


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-0.safetensors"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    (write_model(tmp_path) / name).unlink()
    with pytest.raises(ArtifactRefused) as refused:
        compute_base_digest(tmp_path)
    assert refused.value.code == "bad_base_model"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused, match="two shards"):
        compute_base_digest(write_model(tmp_path, shards=[TENSORS, TENSORS]))


def test_a_shard_that_was_cut(tmp_path: Path) -> None:
    shard = write_model(tmp_path) / "model-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactRefused) as refused:
        compute_base_digest(tmp_path)
    assert refused.value.code == "truncated"


@pytest.mark.model
def test_golden_digest_of_the_real_base_model(base_model_dir: Path) -> None:
    """SmolLM2-135M-Instruct as `make setup` converts it: the conversion is deterministic, and so is the digest."""
    assert compute_base_digest(base_model_dir) == REAL_DIGEST
