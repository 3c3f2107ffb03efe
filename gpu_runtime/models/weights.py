"""Owns reading a base model's safetensors into the fused matrices the model computes with.

q, k, v are stacked into one matrix and gate, up into another: one GEMM for what shares an input. All matrices are
(out, in), as stored. Norm weights are always f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from gpu_runtime.kernels.backend import LayerWeights
from gpu_runtime.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """`head` is `embedding` itself where the model ties them. Both (vocab, hidden)."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


def load_weights(model_dir: Path, *, spec: ModelSpec, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ModelWeights:
    """Read every *.safetensors of `model_dir`.

    Raises ValueError when the folder has none, or when a tensor is missing or has another shape than the config says.
    """
    tensors = _Tensors(model_dir, dtype=dtype, device=device)
    embedding = tensors.take("model.embed_tokens.weight", shape=(spec.vocab_size, spec.hidden_size))
    head = embedding if spec.tied_head else tensors.take("lm_head.weight", shape=(spec.vocab_size, spec.hidden_size))
    layers = tuple(_layer(tensors, spec, f"model.layers.{index}.") for index in range(spec.num_layers))
    final_norm = tensors.take("model.norm.weight", shape=(spec.hidden_size,)).float()
    return ModelWeights(embedding, layers, final_norm, head)


def _layer(tensors: _Tensors, spec: ModelSpec, prefix: str) -> LayerWeights:
    def linear(block: str, *targets: str) -> torch.Tensor:
        shapes = [spec.target_shape(target) for target in targets]
        parts = [
            tensors.take(f"{prefix}{block}.{target}.weight", shape=(num_out, num_in))
            for target, (num_in, num_out) in zip(targets, shapes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def norm(name: str) -> torch.Tensor:
        return tensors.take(f"{prefix}{name}.weight", shape=(spec.hidden_size,)).float()

    return LayerWeights(
        attention_norm=norm("input_layernorm"),
        qkv=linear("self_attn", "q_proj", "k_proj", "v_proj"),
        o=linear("self_attn", "o_proj"),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp", "gate_proj", "up_proj"),
        down=linear("mlp", "down_proj"),
    )


class _Tensors:
    """All tensors of a folder by name; a name may lack the leading `model.`, as a bare decoder's export has it."""

    def __init__(self, model_dir: Path, *, dtype: torch.dtype, device: str) -> None:
        self._where = model_dir
        self._dtype = dtype
        self._files: Mapping[str, Path] = _index(model_dir)
        self._device = device

    def take(self, name: str, *, shape: tuple[int, ...]) -> torch.Tensor:
        found = name if name in self._files else name.removeprefix("model.")
        if found not in self._files:
            raise ValueError(f"{self._where} has no tensor {name}: the safetensors files are incomplete or of another architecture")
        with safe_open(self._files[found], framework="pt", device=self._device) as file:
            tensor: torch.Tensor = file.get_tensor(found)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name} in {self._where} has shape {tuple(tensor.shape)}, config.json says {shape}")
        return tensor.to(self._dtype).contiguous()


def _index(model_dir: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise ValueError(f"{model_dir} holds no *.safetensors file: point model_dir at a converted base model")
    return files
