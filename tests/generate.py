"""Makes PEFT adapter folders out of nothing but numpy, for every test that needs an adapter of a certain kind.

    adapter = generate_adapter(base, rank=4, targets=("q_proj", "v_proj"), dtype="BF16", seed=1)
    adapter.write(tmp_path / "adapter")         # adapter_config.json and adapter_model.safetensors
    adapter.delta(0, "q_proj")                  # scale * B @ A in float32, of the values as stored

Written apart from registry/artifact on purpose: ranks and scales are worked out here by Python's own `re`, so a test that
compares the two compares two readings of PEFT's rules.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from registry.artifact.base import PARENTS, TARGETS, BaseSpec

PREFIX = "base_model.model.model."
BASE_NAME = "tests/tiny-llama"

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def tiny_base(**changes: Any) -> BaseSpec:
    """Shapes of TINY_CONFIG, with changes."""
    return BaseSpec.from_config(TINY_CONFIG | changes)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the uint16 bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes of float32 values stored as F32, F16 or BF16."""
    if dtype == "BF16":
        return bf16_bits(values).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def decode(data: bytes, dtype: str) -> np.ndarray:
    """Inverse of `encode`: float32 values, flat."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def safetensors_bytes(tensors: Mapping[str, np.ndarray], *, dtype: str = "F32", metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of float32 values stored as `dtype`, tensors in the order of their names."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    blobs, offset = [], 0
    for name in sorted(tensors):
        blob = encode(tensors[name], dtype)
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    return with_header(json.dumps(header, separators=(",", ":")).encode(), b"".join(blobs))


def with_header(header: bytes, data: bytes) -> bytes:
    """The file of a header and a data section, whatever they say."""
    return len(header).to_bytes(8, "little") + header + data


@dataclass(frozen=True)
class GeneratedAdapter:
    """`config`: adapter_config.json. `tensors`: name -> float32 values as they come back from `dtype`."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    dtype: str
    prefix: str = PREFIX

    @property
    def config_bytes(self) -> bytes:
        return json.dumps(self.config, indent=1).encode()  # in order: of patterns, the first that matches wins

    @property
    def weights_bytes(self) -> bytes:
        return safetensors_bytes(self.tensors, dtype=self.dtype, metadata={"format": "pt"})

    @property
    def files(self) -> dict[str, bytes]:
        return {"adapter_config.json": self.config_bytes, "adapter_model.safetensors": self.weights_bytes}

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def with_config(self, **changes: Any) -> GeneratedAdapter:
        """The same tensors under a changed config; a key set to `...` is taken out."""
        config = {key: value for key, value in (self.config | changes).items() if value is not ...}
        return dataclasses.replace(self, config=config)

    def with_tensors(self, **changes: Any) -> GeneratedAdapter:
        """The same config over changed tensors; a name set to `...` is taken out."""
        tensors = {name: value for name, value in (self.tensors | changes).items() if value is not ...}
        return dataclasses.replace(self, tensors=tensors)

    def name(self, layer: int, target: str, part: str) -> str:
        return f"{self.prefix}layers.{layer}.{PARENTS[target]}.{target}.lora_{part}.weight"

    def module(self, layer: int, target: str) -> str:
        """The module's path inside the model that was trained."""
        return f"{self.prefix.removeprefix('base_model.model.')}layers.{layer}.{PARENTS[target]}.{target}"

    def scale(self, layer: int, target: str) -> float:
        rank = self.tensors[self.name(layer, target, "A")].shape[0]
        alpha = first_match(self.config["alpha_pattern"], self.module(layer, target), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)

    def delta(self, layer: int, target: str) -> np.ndarray:
        """scale * B @ A, (out, in) float32; zeros where this target of this layer has no tensors is the caller's affair."""
        a, b = (self.tensors[self.name(layer, target, part)] for part in "AB")
        return np.float32(self.scale(layer, target)) * (b @ a)


def first_match(pattern: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule for rank_pattern and alpha_pattern, by Python's own `re`."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def generate_adapter(
    base: BaseSpec,
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    layers: Sequence[int] | None = None,
    dtype: str = "F32",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    target_modules: object = None,
    prefix: str = PREFIX,
    seed: int = 0,
    scale: float = 0.05,
    base_name: str = BASE_NAME,
    **config_changes: Any,
) -> GeneratedAdapter:
    """One adapter. `rank`, with `rank_pattern`, is the true rank of the tensors; `scale` is the standard deviation of A
    and B; `layers` None means all; `alpha` None means 2 * rank; `target_modules` None lists `targets`."""
    rng = np.random.default_rng(seed)
    config = _config(rank, alpha=2 * rank if alpha is None else alpha, rslora=rslora, base_name=base_name)
    config |= {"rank_pattern": dict(rank_pattern or {}), "alpha_pattern": dict(alpha_pattern or {})}
    config |= {"target_modules": list(targets) if target_modules is None else target_modules} | config_changes
    tensors: dict[str, np.ndarray] = {}
    adapter = GeneratedAdapter(config=config, tensors=tensors, dtype=dtype, prefix=prefix)
    for layer in range(base.num_layers) if layers is None else layers:
        for target in sorted(targets, key=TARGETS.index):
            true_rank = int(first_match(rank_pattern or {}, adapter.module(layer, target), rank))
            features_in, features_out = base.targets[target]
            for part, shape in (("A", (true_rank, features_in)), ("B", (features_out, true_rank))):
                values = rng.normal(0.0, scale, shape).astype(np.float32)
                tensors[adapter.name(layer, target, part)] = decode(encode(values, dtype), dtype).reshape(shape)
    return adapter


def write_adapter(folder: Path, base: BaseSpec, **options: Any) -> Path:
    """`generate_adapter` and write it."""
    return generate_adapter(base, **options).write(folder)


def _config(rank: int, *, alpha: float, rslora: bool, base_name: str) -> dict[str, Any]:
    """adapter_config.json as save_pretrained of PEFT 0.21 writes it."""
    nulls = "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules kasa_config layer_replication"
    nulls += " layers_pattern layers_to_transform lora_ga_config megatron_config modules_to_save monteclora_config revision"
    nulls += " target_parameters trainable_token_indices use_bdlora velora_config"
    off = "ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora"
    return {
        **dict.fromkeys(nulls.split()),
        **dict.fromkeys(off.split(), False),
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "task_type": "CAUSAL_LM",
        "use_rslora": rslora,
    }
