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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 512),
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}),
    ],
)
def test_what_this_runtime_cannot_compute_is_refused_by_name(model_dir: Path, field: str, value: object) -> None:
    named = "rope_type" if field == "rope_parameters" else field
    with pytest.raises(ValueError, match=f"^{named} is "):
        ModelSpec.from_config({**config_of(model_dir), field: value})


def test_old_and_new_rope_fields_mean_the_same(model_dir: Path) -> None:
    config = config_of(model_dir)
    new = ModelSpec.from_config({**config, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}})
    del config["rope_parameters"]
    old = ModelSpec.from_config({**config, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert new.rope == old.rope


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
