"""Owns reading a base model's safetensors into the fused matrices the model computes with.

q, k, v are stacked into one matrix and gate, up into another: one GEMM for what shares an input. All matrices are
(out, in), as stored. Norm weights and biases are always f32, a norm's offset is in its weights.
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
    final_norm = _norm(tensors, spec, "model.norm", size=spec.hidden_size)
    return ModelWeights(embedding, layers, final_norm, head)


def _layer(tensors: _Tensors, spec: ModelSpec, prefix: str) -> LayerWeights:
    names = spec.architecture.norms

    def linear(block: str, *targets: str) -> torch.Tensor:
        parts = [tensors.take(f"{prefix}{block}.{target}.weight", shape=spec.target_shape(target)[::-1]) for target in targets]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bias(name: str, *targets: str) -> torch.Tensor | None:
        if name not in spec.biased:
            return None
        found = [(f"{prefix}self_attn.{target}.bias", spec.target_shape(target)[1]) for target in targets]
        return torch.cat([tensors.take(tensor, shape=(size,), dtype=torch.float32) for tensor, size in found])

    def norm(name: str) -> torch.Tensor:
        return _norm(tensors, spec, f"{prefix}{name}", size=spec.hidden_size)

    def head_norm(name: str) -> torch.Tensor | None:
        return _norm(tensors, spec, f"{prefix}self_attn.{name}", size=spec.head_dim) if spec.architecture.head_norms else None

    return LayerWeights(
        attention_norm=norm(names.attention),
        qkv=linear("self_attn", "q_proj", "k_proj", "v_proj"),
        o=linear("self_attn", "o_proj"),
        mlp_norm=norm(names.mlp),
        gate_up=linear("mlp", "gate_proj", "up_proj"),
        down=linear("mlp", "down_proj"),
        qkv_bias=bias("qkv", "q_proj", "k_proj", "v_proj"),
        o_bias=bias("o", "o_proj"),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        attention_out_norm=None if names.attention_out is None else norm(names.attention_out),
        mlp_out_norm=None if names.mlp_out is None else norm(names.mlp_out),
    )


def _norm(tensors: _Tensors, spec: ModelSpec, name: str, *, size: int) -> torch.Tensor:
    return tensors.take(f"{name}.weight", shape=(size,), dtype=torch.float32) + spec.architecture.norm_offset


class _Tensors:
    """All tensors of a folder by name, under any of the prefixes that exports give a language model."""

    def __init__(self, model_dir: Path, *, dtype: torch.dtype, device: str) -> None:
        self._where = model_dir
        self._dtype = dtype
        self._files: Mapping[str, Path] = _index(model_dir)
        self._device = device

    def take(self, name: str, *, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `dtype`, or as the dtype of all. Raises ValueError."""
        found = next((spelling for spelling in _spellings(name) if spelling in self._files), None)
        if found is None:
            raise ValueError(f"{self._where} has no tensor {name}: the safetensors files are incomplete or of another architecture")
        with safe_open(self._files[found], framework="pt", device=self._device) as file:
            tensor: torch.Tensor = file.get_tensor(found)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name} in {self._where} has shape {tuple(tensor.shape)}, config.json says {shape}")
        return tensor.to(dtype or self._dtype).contiguous()


def _spellings(name: str) -> tuple[str, ...]:
    """As a causal model, as a bare decoder, and as the language model inside a multimodal one (two generations of names)."""
    return (name, name.removeprefix("model."), f"language_model.{name}", name.replace("model.", "model.language_model.", 1))


def _index(model_dir: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise ValueError(f"{model_dir} holds no *.safetensors file: point model_dir at a converted base model")
    return files
