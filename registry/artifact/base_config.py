"""A base model's Hugging Face config.json with every spelling and default resolved.

Families: llama, mistral, qwen2, qwen3, gemma3 (text, also inside the multimodal config). Shapes and the base digest are
taken from here, so that a config saved by an old and by a new transformers give the same ones.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from registry.artifact.errors import ArtifactRefused

MAX_LAYERS = 1024
MAX_SIZE = 2**24

_ALL_FAMILIES: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": None,
    "max_window_layers": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 10000.0,
}
_QWEN = {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": 4096, "num_key_value_heads": 32}
_GEMMA3 = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "head_dim": 256,
    "rope_theta": 1000000.0,
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# What transformers assumes where a saved config is silent (it leaves out what equals its default).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma3_text": _GEMMA3,
}
# The keys that the base digest covers. Everything else (dropout, token ids, initializer_range, dtype,
# transformers_version, ...) changes no answer of a served model.
CONFIG_SUBSET = frozenset(
    {
        *(_ALL_FAMILIES.keys() - {"rope_theta"}),
        *("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("num_hidden_layers", "vocab_size", "max_position_embeddings", "rope"),
    }
)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, with `model_type` one of FAMILIES. Raises ArtifactRefused."""
    text = dict(config)
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping):
        text = {"model_type": "gemma3_text", **config["text_config"]}
    family = text.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ArtifactRefused(
            "unsupported_base_model",
            f"the family {str(family)[:40]!a} is not served",
            field="model_type",
            value=family,
            remedy=f"choose a base model of {', '.join(FAMILIES)}",
        )
    return text


def sizes_of(text: Mapping[str, Any]) -> dict[str, int]:
    """The seven sizes of a `text_config`, defaults of its family resolved. Raises ArtifactRefused."""
    defaults = FAMILIES[text["model_type"]]
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes = {name: _size(text, name, default=defaults.get(name)) for name in required}
    sizes["num_hidden_layers"] = _size(text, "num_hidden_layers", limit=MAX_LAYERS)
    kv_heads = defaults.get("num_key_value_heads", sizes["num_attention_heads"])
    sizes["num_key_value_heads"] = _size(text, "num_key_value_heads", default=kv_heads)
    head_dim = defaults.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    sizes["head_dim"] = _size(text, "head_dim", default=head_dim)
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise _bad("num_key_value_heads", sizes["num_key_value_heads"], "it does not divide num_attention_heads")
    return sizes


def _size(text: Mapping[str, Any], name: str, *, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = text.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= limit:
        raise _bad(name, value, f"it is {str(value)[:40]!a}, not an integer between 1 and {limit}")
    return value


def _bad(name: str, value: object, problem: str) -> ArtifactRefused:
    remedy = "give the config.json that belongs to the model"
    return ArtifactRefused("bad_base_model", problem, field=name, value=value, remedy=remedy)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of CONFIG_SUBSET, resolved, in one spelling. Raises ArtifactRefused.

    Fractions are rounded to float32: a config that went through a GGUF carries 9.999999747378752e-06 where the original
    says 1e-05, and no model computes with more.
    """
    text = text_config(config)
    defaults = _ALL_FAMILIES | FAMILIES[text["model_type"]]
    subset: dict[str, Any] = {name: text[name] if text.get(name) is not None else default for name, default in defaults.items()}
    subset |= sizes_of(text)
    if text.get("hidden_activation") is not None:
        subset["hidden_act"] = text["hidden_activation"]
    if text["model_type"] == "mistral" and "sliding_window" in text:
        subset["sliding_window"] = text["sliding_window"]  # here null is a value of its own: full attention
    if subset["use_sliding_window"] is False:
        subset |= {"sliding_window": None, "max_window_layers": None}  # switched off: whatever stands there is idle
    subset["model_type"] = text["model_type"]
    subset["max_position_embeddings"] = text.get("max_position_embeddings")
    subset["rope"] = _rope(text, default_theta=subset.pop("rope_theta"))
    return {name: _canonical(value, field=name) for name, value in subset.items()}


def _mapping(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = source.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise _bad(name, value, "it is not an object")
    return dict(value or {})


def _rope(text: Mapping[str, Any], *, default_theta: Any) -> dict[str, Any]:
    """Rotary parameters by kind of attention, from `rope_parameters` (transformers 5) or rope_theta and rope_scaling."""
    given = _mapping(text, "rope_parameters")
    by_kind = "full_attention" in given or "sliding_attention" in given
    full = _mapping(given, "full_attention") if by_kind else given or _mapping(text, "rope_scaling")
    full = {"rope_theta": default_theta, **full}
    full["rope_type"] = full.pop("type", None) or full.get("rope_type") or "default"
    rope: dict[str, Any] = {"full": full}
    if text["model_type"] == "gemma3_text":
        local = _mapping(given, "sliding_attention") or {"rope_theta": text.get("rope_local_base_freq", 10000.0)}
        rope["sliding"] = {"rope_type": "default", **local}
        rope["layer_types"] = _layer_types(text)
    return rope


def _layer_types(text: Mapping[str, Any]) -> list[str]:
    """Kind of attention a layer; older configs give the period of the full-attention layers instead."""
    if isinstance(text.get("layer_types"), list):
        return list(text["layer_types"])
    period = _size(text, "sliding_window_pattern", default=6)
    layers = range(1, _size(text, "num_hidden_layers", limit=MAX_LAYERS) + 1)
    return ["sliding_attention" if layer % period else "full_attention" for layer in layers]


def _canonical(value: Any, *, field: str) -> Any:
    """One spelling of a number: 100000 and 100000.0 are the same; a fraction is what float32 keeps of it."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item, field=field) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item, field=field) for item in value]
    if not isinstance(value, float):
        return value
    try:
        single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError as error:
        raise _bad(field, value, "it is past what float32 holds") from error
    return int(single) if single.is_integer() else single
