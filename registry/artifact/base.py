"""What an adapter must fit: the shapes of a base model, derived from its Hugging Face config.json.

Families: llama, mistral, qwen2, qwen3, gemma3 (text, also inside the multimodal config). `settings` is the config with
every spelling and default resolved; the base digest (base_digest.py) is taken over it, so that a config saved by an old
and by a new transformers give one digest.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from registry.artifact.errors import ArtifactRefused

# The order in which targets stand everywhere.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARENTS = {name: "self_attn" if name in TARGETS[:4] else "mlp" for name in TARGETS}

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
_GEMMA3 = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "head_dim": 256,
    "rope_theta": 1000000.0,
}
# What transformers assumes where a saved config is silent (it leaves out what equals its default).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": 4096, "num_key_value_heads": 32},
    "qwen3": {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
    "gemma3_text": _GEMMA3,
}


@dataclass(frozen=True)
class BaseSpec:
    """Shapes of a base model. `targets`: name -> (in, out) features of that linear, in the order of TARGETS."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    targets: Mapping[str, tuple[int, int]]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseSpec:
        """From the parsed config.json. Raises ArtifactRefused for an unknown family or a size that cannot be."""
        text = text_config(config)
        sizes = sizes_of(text)
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        query = sizes["num_attention_heads"] * sizes["head_dim"]
        keys = sizes["num_key_value_heads"] * sizes["head_dim"]
        features = [(hidden, query), (hidden, keys), (hidden, keys), (query, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
        return cls(
            model_type=text["model_type"],
            num_layers=sizes["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=inner,
            num_heads=sizes["num_attention_heads"],
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes["head_dim"],
            vocab_size=sizes["vocab_size"],
            targets=dict(zip(TARGETS, features, strict=True)),
        )

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return fields | {"targets": {name: list(features) for name, features in self.targets.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BaseSpec:
        """What `to_json` made, key order apart."""
        targets = {name: (int(value["targets"][name][0]), int(value["targets"][name][1])) for name in TARGETS}
        return cls(**{**value, "targets": targets})


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
    """The eight sizes, defaults of the family resolved."""
    defaults = FAMILIES[text["model_type"]]
    sizes = {name: _size(text, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    sizes["num_hidden_layers"] = _size(text, "num_hidden_layers", limit=MAX_LAYERS)
    kv_heads = defaults.get("num_key_value_heads", sizes["num_attention_heads"])
    sizes["num_key_value_heads"] = _size(text, "num_key_value_heads", default=kv_heads)
    head_dim = defaults.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    sizes["head_dim"] = _size(text, "head_dim", default=head_dim)
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise _bad_size("num_key_value_heads", sizes["num_key_value_heads"], "it does not divide num_attention_heads")
    return sizes


def _size(text: Mapping[str, Any], name: str, *, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = text.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= limit:
        raise _bad_size(name, value, f"it is {str(value)[:40]!a}, not an integer between 1 and {limit}")
    return value


def _bad_size(name: str, value: object, problem: str) -> ArtifactRefused:
    remedy = "give the config.json that belongs to the model"
    return ArtifactRefused("bad_base_model", problem, field=name, value=value, remedy=remedy)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's behaviour in one spelling: every number of CONFIG_SUBSET resolved, floats rounded to float32.

    float32, because a config that went through a GGUF carries 9.999999747378752e-06 where the original says 1e-05, and
    no model computes with more.
    """
    text = text_config(config)
    defaults = _ALL_FAMILIES | FAMILIES[text["model_type"]]
    subset: dict[str, Any] = {name: text[name] if text.get(name) is not None else default for name, default in defaults.items()}
    subset |= sizes_of(text)
    if text.get("hidden_activation") is not None:
        subset["hidden_act"] = text["hidden_activation"]
    if text["model_type"] == "mistral" and "sliding_window" in text:
        subset["sliding_window"] = text["sliding_window"]  # here null is a value of its own: full attention
    subset["model_type"] = text["model_type"]
    subset["max_position_embeddings"] = text.get("max_position_embeddings")
    subset["rope"] = _rope(text, default_theta=subset.pop("rope_theta"))
    return {name: _canonical(value) for name, value in subset.items()}


# The keys of config.json that the base digest covers, after `settings` has resolved them. Everything else (dropout,
# token ids, initializer_range, torch_dtype, transformers_version, ...) changes no answer of a served model.
CONFIG_SUBSET = frozenset(
    {
        *(_ALL_FAMILIES.keys() - {"rope_theta"}),
        *("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("num_hidden_layers", "vocab_size", "max_position_embeddings", "rope"),
    }
)


def _rope(text: Mapping[str, Any], *, default_theta: Any) -> dict[str, Any]:
    """Rotary parameters by kind of attention, from `rope_parameters` (transformers 5) or rope_theta and rope_scaling."""
    given = text.get("rope_parameters") or {}
    full = given.get("full_attention") or (given if "rope_theta" in given or "rope_type" in given else None)
    if full is None:
        full = dict(text.get("rope_scaling") or {})
    full = {"rope_theta": default_theta, **full}
    full["rope_type"] = full.pop("type", None) or full.get("rope_type") or "default"
    rope: dict[str, Any] = {"full": full}
    if text["model_type"] == "gemma3_text":
        local = given.get("sliding_attention") or {"rope_theta": text.get("rope_local_base_freq", 10000.0)}
        rope["sliding"] = {"rope_type": "default", **local}
        rope["pattern"] = _sliding_layers(text)
    return rope


def _sliding_layers(text: Mapping[str, Any]) -> list[str]:
    """Kind of attention a layer; older configs give the period of the full-attention layers instead."""
    if text.get("layer_types"):
        return list(text["layer_types"])
    period = int(text.get("sliding_window_pattern") or 6)
    layers = range(1, int(text["num_hidden_layers"]) + 1)
    return ["sliding_attention" if layer % period else "full_attention" for layer in layers]


def _canonical(value: Any) -> Any:
    """One spelling of a number: 100000 and 100000.0 are the same; a fraction is what float32 keeps of it."""
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        single: float = struct.unpack("<f", struct.pack("<f", value))[0]
        return int(single) if single.is_integer() else single
    return value
