"""Gemma 3, its language model: four norms a layer, norms of q and k, layers with a window between layers without.

Norms multiply by 1 + weight, embeddings by sqrt(hidden_size), scores by query_pre_attn_scalar^-1/2; the MLP's gate is
gelu (tanh form); sliding layers have a rope base of their own. Gemma 2's soft caps are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpu_runtime.kernels.backend import LayerAttention
from gpu_runtime.models.architecture import Architecture, NormNames, Settings, sliding_layers, window_of


def _layers(settings: Settings, _config: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    window, kinds = window_of(settings), settings["rope"]["layer_types"]
    sliding = sliding_layers(kinds, int(settings["num_hidden_layers"]))
    return tuple(LayerAttention(rope=1, window=window) if is_sliding else LayerAttention() for is_sliding in sliding)


def _score_scale(settings: Settings, _head_dim: int) -> float:
    return 1 / math.sqrt(settings["query_pre_attn_scalar"])


GEMMA3 = Architecture(
    "gemma3_text",
    max_positions=131072,
    allowed={
        "hidden_act": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
    },
    layers=_layers,
    score_scale=_score_scale,
    activation="gelu_tanh",
    head_norms=True,
    norms=NormNames(mlp="pre_feedforward_layernorm", attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"),
    norm_offset=1.0,
    scaled_embedding=True,
    outgrows_float16=True,
)
