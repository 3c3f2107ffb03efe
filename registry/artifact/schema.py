"""The closed schema of adapter_config.json (PEFT 0.2 to 0.21): what each key may say, and why not otherwise.

Three kinds of key: those that `lora.py` reads, those that only training looked at, and those that must be switched off
because their delta is not scale * B @ A on a linear of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.artifact.errors import ArtifactRefused, printable

PEFT_TYPE = "LORA"
REQUIRED = ("peft_type", "r", "lora_alpha")
READ = frozenset(
    {*REQUIRED, "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "fan_in_fan_out"}
    | {"exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "bias"}
)
# Said about training or about the file; the tensors are what they are.
TRAINING_ONLY = frozenset(
    {"auto_mapping", "task_type", "inference_mode", "lora_dropout", "peft_version", "merge_weights", "runtime_config"}
    | {"megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"}
    | {"ensure_weight_tying", "qalora_group_size"}
)
_SERVE_PLAIN = "train it again as plain LoRA"
# key -> (code, what it means, remedy); null, false, [] and {} switch it off
MUST_BE_OFF: dict[str, tuple[str, str, str]] = {
    "use_dora": ("dora", "DoRA scales the base model's weights", _SERVE_PLAIN),
    "modules_to_save": ("modules_to_save", "whole modules were trained beside the LoRA", "train with modules_to_save=None"),
    "lora_bias": ("bias", "biases were trained", "train with lora_bias=False"),
    "layer_replication": ("layer_replication", "it changes the number of layers", "merge it into a base model of its own"),
    "trainable_token_indices": ("trainable_tokens", "it changes rows of the embedding", "train without new tokens"),
    "target_parameters": ("target_parameters", "it changes bare parameters of experts", "target linear modules"),
    "alora_invocation_tokens": ("alora", "it is active only after its invocation tokens", _SERVE_PLAIN),
    "use_qalora": ("unsupported_variant", "QALoRA pools its inputs", _SERVE_PLAIN),
    "use_bdlora": ("unsupported_variant", "BD-LoRA packs its matrices in blocks", _SERVE_PLAIN),
    "kasa_config": ("unsupported_variant", "KaSA truncates the base model's weights", _SERVE_PLAIN),
    "monteclora_config": ("unsupported_variant", "MonteCLoRA carries sampler tensors", _SERVE_PLAIN),
    "arrow_config": ("unsupported_variant", "Arrow routes between adapters", "push the adapters one by one"),
    "enable_lora": ("unsupported_variant", "it fuses projections as PEFT 0.2 did", "save it with a current PEFT"),
    "fan_in_fan_out": ("fan_in_fan_out", "its base had transposed (Conv1D) weights", "train on the base model it is pushed for"),
}
KNOWN = READ | TRAINING_ONLY | MUST_BE_OFF.keys()

INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def require_plain_lora(fields: Mapping[str, Any]) -> None:
    """Refuse every config whose meaning is not a plain LoRA. Raises ArtifactRefused, the most telling reason first."""
    _require_lora(fields)
    unknown = sorted(fields.keys() - KNOWN)
    if unknown:
        remedy = "remove it if it says nothing about the weights, or use a newer registry"
        raise refuse("unknown_key", "this registry does not know the key", field=printable(unknown[0])[:80], remedy=remedy)
    for key, (code, meaning, remedy) in MUST_BE_OFF.items():
        if fields.get(key) not in (None, False, [], {}):
            raise refuse(code, f"{meaning}, which is not served", field=key, value=fields[key], remedy=remedy)
    _require_no_bias(fields.get("bias"))
    _require_init(fields.get("init_lora_weights"))
    for key in REQUIRED:
        if fields.get(key) is None:
            raise refuse("missing_key", "it is absent", field=key, remedy="save the adapter with save_pretrained of PEFT")


def refuse(code: str, problem: str, *, field: str, remedy: str, value: object = None) -> ArtifactRefused:
    return ArtifactRefused(code, problem, field=field, value=value, remedy=remedy)


def _require_lora(fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind is None:
        remedy = "save the adapter with save_pretrained of PEFT"
        raise refuse("missing_key", "it is absent, so this is no adapter of PEFT", field="peft_type", remedy=remedy)
    if kind != PEFT_TYPE:
        remedy = "push a LoRA adapter, or convert it with PEFT's save_as_lora"
        raise refuse("unsupported_peft_type", f"{printable(repr(kind))[:40]} is not LORA", field="peft_type", value=kind, remedy=remedy)


def _require_no_bias(bias: object) -> None:
    if bias not in (None, "none"):
        raise refuse(
            "bias", f"biases were trained ({printable(repr(bias))[:40]})", field="bias", value=bias, remedy="train with bias='none'"
        )


def _require_init(init: object) -> None:
    if isinstance(init, str) and init.startswith(INITS_THAT_CHANGE_THE_BASE):
        raise refuse(
            "init_changes_base",
            f"{printable(init)[:40]} changed the base model's weights before training",
            field="init_lora_weights",
            value=init,
            remedy="save it with path_initial_model_for_weight_conversion, which turns it into a plain LoRA",
        )
    # 1 == True and 0 == False in Python; JSON tells them apart
    if type(init) not in (bool, str, type(None)) or init not in INITS:
        raise refuse(
            "bad_value",
            f"{printable(repr(init))[:40]} is not an initialisation that this registry knows",
            field="init_lora_weights",
            value=init,
            remedy=f"known are {', '.join(str(known) for known in INITS)}",
        )
