"""Owns what a base model's config.json means to the runtime, and refuses what it cannot compute exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpu_runtime.core import TARGETS

MODEL_TYPES = ("llama", "mistral")


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
    def from_config(cls, config: Mapping[str, Any]) -> RopeSpec:
        """From `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
        rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10000.0)}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type is {kind!r}; this runtime computes default, linear and llama3")
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
    """Shapes of a decoder of the Llama family."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeSpec
    tied_head: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """From a parsed config.json. Raises ValueError naming the field that this runtime cannot compute."""
        _refuse_unknown_arithmetic(config)
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        return cls(
            num_layers=_positive(config, "num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate_size=_positive(config, "intermediate_size"),
            vocab_size=_positive(config, "vocab_size"),
            max_positions=_positive(config, "max_position_embeddings"),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=RopeSpec.from_config(config),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
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


def _refuse_unknown_arithmetic(config: Mapping[str, Any]) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "model_type": MODEL_TYPES,
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
    }
    for field, values in allowed.items():
        value = config.get(field, values[0])
        if value not in values:
            raise ValueError(f"{field} is {value!r}; this runtime computes {' or '.join(map(repr, values))}: choose another base model")


def _positive(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} is {value!r}; config.json must give a whole number of at least 1")
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, (list, tuple)) else (int(str(value)),)
