"""Owns how one family's decoder differs from the plainest one: what each file of this folder fills in.

The plainest is Llama: RMSNorm before attention and MLP, rotary GQA over everything before, silu-gated MLP, no biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gpu_runtime.kernels.backend import LayerAttention

Settings = Mapping[str, Any]  # `registry.artifact.base_config.settings`: every default of the family resolved


@dataclass(frozen=True)
class NormNames:
    """Tensor names of a layer's norms; those of what attention and MLP give exist in some families only."""

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    attention_out: str | None = None
    mlp_out: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One family.

    max_positions       what its config means where it names none
    allowed             settings that must have one of these values, because nothing else is computed
    biased              which blocks of linears have a bias
    layers              how each layer attends; `rope` 0 is the config's full-attention rope, 1 its sliding one
    score_scale         of attention scores, from settings and head_dim
    head_norms          RMSNorm of each head of q and k
    norm_offset         norms multiply by offset + weight
    scaled_embedding    embeddings are multiplied by sqrt(hidden_size)
    outgrows_float16    its activations are larger than float16 holds
    """

    model_type: str
    max_positions: int
    allowed: Mapping[str, tuple[object, ...]]
    layers: Callable[[Settings, Mapping[str, Any]], tuple[LayerAttention, ...]]
    biased: Callable[[Settings], frozenset[str]] = lambda _: frozenset()
    score_scale: Callable[[Settings, int], float] = lambda _, head_dim: head_dim**-0.5
    activation: Literal["silu", "gelu_tanh"] = "silu"
    head_norms: bool = False
    norms: NormNames = NormNames()
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    outgrows_float16: bool = False


SILU: Mapping[str, tuple[object, ...]] = {"hidden_act": ("silu",), "mlp_bias": (False,)}


def full_attention(settings: Settings, _config: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    """Every layer sees everything before."""
    return (LayerAttention(),) * int(settings["num_hidden_layers"])


def bias_of_attention(settings: Settings) -> frozenset[str]:
    """`attention_bias` gives q, k, v and o one each."""
    return frozenset({"qkv", "o"}) if settings["attention_bias"] else frozenset()


def window_of(settings: Settings) -> int:
    """`sliding_window` in tokens, 0 for none. Raises ValueError."""
    value = settings["sliding_window"]
    if value is None:
        return 0
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"sliding_window is {value!r}; it must be null or a whole number of tokens of at least 1")
    return value


def windowed_after(settings: Settings, config: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    """Qwen: with `use_sliding_window` the layers that `layer_types` names, else those from `max_window_layers` on, have the window."""
    window, num_layers = window_of(settings), int(settings["num_hidden_layers"])
    kinds = config.get("layer_types")
    if not window:
        return full_attention(settings, config)
    if kinds is None:
        kinds = ["sliding_attention" if layer >= settings["max_window_layers"] else "full_attention" for layer in range(num_layers)]
    return tuple(LayerAttention(window=window if is_sliding else 0) for is_sliding in sliding_layers(kinds, num_layers))


def sliding_layers(kinds: object, num_layers: int) -> list[bool]:
    """`layer_types` as whether each layer has the window. Raises ValueError."""
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"layer_types is {str(kinds)[:80]}; it must name the attention of each of {num_layers} layers")
    other = next((kind for kind in kinds if kind not in ("sliding_attention", "full_attention")), None)
    if other is not None:
        raise ValueError(f"layer_types holds {other!r}; this runtime computes 'full_attention' and 'sliding_attention'")
    return [kind == "sliding_attention" for kind in kinds]
