"""Model specs and weights: what config.json may say, and folders that do not hold what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_runtime.models.spec import ModelSpec
from gpu_runtime.models.weights import load_weights
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tied=False)


def config_of(model_dir: Path) -> dict[str, Any]:
    return dict(json.loads((model_dir / "config.json").read_text()))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"max_position_embeddings": "many"}, "max_position_embeddings"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_act"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_what_this_runtime_cannot_compute_is_refused_by_name(model_dir: Path, family: str, changes: dict[str, Any], named: str) -> None:
    plain = {"model_type": family, "hidden_act": "gelu_pytorch_tanh" if family == "gemma3_text" else "silu"}
    config = {key: value for key, value in config_of(model_dir).items() if key != "rope_parameters"} | plain
    ModelSpec.from_config(config)
    with pytest.raises(ValueError, match=f"^{named} (is|holds) "):
        ModelSpec.from_config(config | changes)


@pytest.mark.parametrize(("field", "value"), [("model_type", "gpt2"), ("hidden_size", None), ("num_hidden_layers", 0)])
def test_what_no_model_can_say_is_refused_by_the_artifacts_own_rules(model_dir: Path, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        ModelSpec.from_config({**config_of(model_dir), field: value})


def test_a_multimodal_gemmas_language_model_is_found(tmp_path: Path) -> None:
    """Its config is nested and leaves out what equals transformers' defaults; its tensors have a longer name."""
    model_dir = make_tiny_model(tmp_path / "text", family="gemma3_text", head_dim=32, sliding_window=20, vector_noise=0.3)
    text = config_of(model_dir)
    spec = ModelSpec.from_config(text)
    assert ModelSpec.from_config({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 2]}) == spec
    silent = {key: value for key, value in text.items() if key not in ("num_attention_heads", "vocab_size", "num_key_value_heads")}
    found = ModelSpec.from_config({"model_type": "gemma3", "text_config": silent})
    assert (found.num_heads, found.num_kv_heads, found.vocab_size) == (8, 4, 262208)
    whole = load_weights(model_dir, spec=spec)
    tensors = load_file(model_dir / "model.safetensors")
    for number, prefix in enumerate(("model.language_model.", "language_model.model.")):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        assert load_weights(folder, spec=spec).layers[1].qkv.equal(whole.layers[1].qkv)


def test_old_and_new_rope_fields_mean_the_same(model_dir: Path) -> None:
    config = config_of(model_dir)
    new = ModelSpec.from_config({**config, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}})
    del config["rope_parameters"]
    old = ModelSpec.from_config({**config, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert new.ropes == old.ropes


def test_shards_bare_names_and_half_precision_load_alike(model_dir: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_config(config_of(model_dir))
    tensors = load_file(model_dir / "model.safetensors")
    names = sorted(tensors)
    bare = {name.removeprefix("model."): tensors[name].bfloat16() for name in names}
    parts = list(bare)
    save_file({name: bare[name] for name in parts[::2]}, tmp_path / "model-1.safetensors")
    save_file({name: bare[name] for name in parts[1::2]}, tmp_path / "model-2.safetensors")
    whole, split = load_weights(model_dir, spec=spec), load_weights(tmp_path, spec=spec)
    assert split.head.dtype == torch.float32
    assert split.head.equal(whole.head.bfloat16().float())
    assert split.layers[1].gate_up.equal(whole.layers[1].gate_up.bfloat16().float())
    assert not whole.head.equal(whole.embedding)


def test_missing_and_misshapen_tensors_are_named(model_dir: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_config(config_of(model_dir))
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file"):
        load_weights(tmp_path, spec=spec)
    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"has no tensor {name}"):
        load_weights(tmp_path, spec=spec)
    save_file({**tensors, name: tensors[name][1:].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor {name} .* has shape"):
        load_weights(tmp_path, spec=spec)


def test_the_same_arguments_make_the_same_tiny_model(model_dir: Path, tmp_path: Path) -> None:
    again = make_tiny_model(tmp_path, tied=False)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (model_dir / name).read_bytes()
