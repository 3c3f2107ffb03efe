"""Owns what a base model's config.json means to the runtime, and refuses what it cannot compute exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpu_runtime.core import TARGETS
from gpu_runtime.kernels.backend import LayerAttention
from gpu_runtime.models.architecture import Architecture, Settings
from gpu_runtime.models.gemma3 import GEMMA3
from gpu_runtime.models.llama import LLAMA
from gpu_runtime.models.mistral import MISTRAL
from gpu_runtime.models.qwen2 import QWEN2
from gpu_runtime.models.qwen3 import QWEN3
from registry.artifact.base_config import settings, text_config

ARCHITECTURES = {one.model_type: one for one in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3)}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding; `llama3` smooths the low frequencies by the four parameters (Llama 3.1, config `rope_scaling`)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    @classmethod
    def from_parameters(cls, rope: Mapping[str, Any]) -> RopeSpec:
        """From the resolved parameters of one kind of attention. Raises ValueError naming what is not computed."""
        kind = rope["rope_type"]
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type is {kind!r}; this runtime computes default, linear and llama3: choose another base model")
        if (part := rope.get("partial_rotary_factor") or 1) != 1:
            raise ValueError(f"partial_rotary_factor is {part!r}; this runtime rotates whole heads: choose another base model")
        return cls(
            theta=float(rope["rope_theta"]),
            kind=kind,
            factor=float(rope.get("factor", 1.0)),
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            original_max_positions=int(rope.get("original_max_position_embeddings", 8192)),
        )

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """Angle per position of each of the head_dim / 2 pairs, f32."""
        base = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
        if self.kind == "linear":
            return base / self.factor
        return self._smoothed(base) if self.kind == "llama3" else base

    def _smoothed(self, base: torch.Tensor) -> torch.Tensor:
        wavelength = 2 * math.pi / base
        turns = self.original_max_positions / wavelength
        smooth = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - smooth) * base / self.factor + smooth * base


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a decoder, and how its architecture computes them. `attention` and its ropes: one a layer, as DecoderSpec has them."""

    architecture: Architecture
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    ropes: tuple[RopeSpec, ...]
    attention: tuple[LayerAttention, ...]
    score_scale: float
    biased: frozenset[str]
    tied_head: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """From a parsed config.json. Raises ValueError naming the field that this runtime cannot compute."""
        text = text_config(config)
        resolved, architecture = settings(config), ARCHITECTURES[text["model_type"]]
        _refuse_unknown_arithmetic(resolved, text, architecture)
        ropes = [RopeSpec.from_parameters(resolved["rope"][kind]) for kind in ("full", "sliding") if kind in resolved["rope"]]
        return cls(
            architecture=architecture,
            num_layers=resolved["num_hidden_layers"],
            hidden_size=resolved["hidden_size"],
            num_heads=resolved["num_attention_heads"],
            num_kv_heads=resolved["num_key_value_heads"],
            head_dim=resolved["head_dim"],
            intermediate_size=resolved["intermediate_size"],
            vocab_size=resolved["vocab_size"],
            max_positions=_positions(text, architecture),
            rms_norm_eps=float(resolved["rms_norm_eps"]),
            ropes=tuple(ropes),
            attention=architecture.layers(resolved, text),
            score_scale=architecture.score_scale(resolved, resolved["head_dim"]),
            biased=architecture.biased(resolved),
            tied_head=bool(resolved["tie_word_embeddings"]),
            eos_token_ids=_token_ids(text.get("eos_token_id", config.get("eos_token_id"))),
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def target_shape(self, target: str) -> tuple[int, int]:
        """(in_features, out_features) of a target, the same in every layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        outs = (self.q_size, self.kv_size, self.kv_size, hidden, inner, inner, hidden)
        ins = (hidden, hidden, hidden, self.q_size, hidden, hidden, inner)
        index = TARGETS.index(target)
        return ins[index], outs[index]

    @property
    def widest_target(self) -> int:
        """Elements of the longest rank row that any adapter of this model can have."""
        return max(max(self.target_shape(target)) for target in TARGETS)


def _refuse_unknown_arithmetic(resolved: Settings, text: Mapping[str, Any], architecture: Architecture) -> None:
    given = {**resolved, "use_bidirectional_attention": bool(text.get("use_bidirectional_attention"))}
    for field, values in {**architecture.allowed, "use_bidirectional_attention": (False,)}.items():
        if given[field] not in values:
            computed = " or ".join(map(repr, values))
            raise ValueError(f"{field} is {given[field]!r}; this runtime computes {computed}: choose another base model")


def _positions(text: Mapping[str, Any], architecture: Architecture) -> int:
    value = text.get("max_position_embeddings", architecture.max_positions)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"max_position_embeddings is {value!r}; config.json must give a whole number of at least 1")
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, (list, tuple)) else (int(str(value)),)
