"""Mistral: Llama whose layers all see the last `sliding_window` tokens, where the config names a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_runtime.kernels.backend import LayerAttention
from gpu_runtime.models.architecture import SILU, Architecture, Settings, window_of


def _layers(settings: Settings, _config: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    return (LayerAttention(window=window_of(settings)),) * int(settings["num_hidden_layers"])


MISTRAL = Architecture("mistral", max_positions=131072, allowed={**SILU, "attention_bias": (False,)}, layers=_layers)
