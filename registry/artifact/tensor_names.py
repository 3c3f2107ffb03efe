"""Where a tensor of an adapter belongs, read from its name; and what a name that belongs nowhere gives away.

PEFT writes `base_model.model.<module>.lora_A.weight`, <module> being the path inside the model that was trained. Known
variants of the path: with and without the leading `model.` (trained on the bare model, or lost on the way), and the text
half of a multimodal model, before and after transformers 5. A `.default` left over from memory is taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from registry.artifact.base import PARENTS, TARGETS, BaseSpec
from registry.artifact.errors import printable
from registry.artifact.header import TensorEntry
from registry.artifact.schema import MUST_BE_OFF, refuse

_LORA = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")
_MODULE = re.compile(
    r"(?:model\.|model\.language_model\.|language_model\.model\.|language_model\.)?"
    r"layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<parent>self_attn|mlp)\.(?P<target>[a-z_]+)"
)
# Signs in a name that give away what the tensor is: (sign, code, what it is, remedy).
_SIGNS: tuple[tuple[str, str, str, str], ...] = (
    ("lora_magnitude_vector", "dora", "a DoRA magnitude", MUST_BE_OFF["use_dora"][2]),
    ("lora_embedding_", "embeddings", "LoRA on an embedding", "train without embeddings among the targets"),
    ("embed_tokens.lora_", "embeddings", "LoRA on an embedding", "train without embeddings among the targets"),
    ("trainable_tokens", "trainable_tokens", "trained rows of the embedding", MUST_BE_OFF["trainable_token_indices"][2]),
    ("lora_diag", "unsupported_variant", "KaSA's diagonal", MUST_BE_OFF["kasa_config"][2]),
    ("monteclora", "unsupported_variant", "MonteCLoRA's sampler", MUST_BE_OFF["monteclora_config"][2]),
    ("modules_to_save", "modules_to_save", "a whole module", MUST_BE_OFF["modules_to_save"][2]),
)


@dataclass(frozen=True)
class PlacedTensor:
    """`module_names`: the module's path as the file says it, and as the base model says it (one where they agree)."""

    tensor: TensorEntry
    layer: int
    target: str
    part: str  # "A" or "B"
    module_names: tuple[str, ...]


def place_tensors(tensors: Iterable[TensorEntry], *, base: BaseSpec) -> list[PlacedTensor]:
    """Layer, target and part of every tensor. Raises ArtifactRefused if one belongs nowhere, or there is none."""
    placed, strays = [], []
    for tensor in tensors:
        item = _place(tensor, base)
        if item is None:
            strays.append(tensor)
        else:
            placed.append(item)
    for tensor in strays:
        _refuse_by_sign(tensor)
    if not placed:
        _refuse_all(strays, base)
    if strays:
        _refuse_stray(strays[0], base)
    return placed


def _place(tensor: TensorEntry, base: BaseSpec) -> PlacedTensor | None:
    lora = _LORA.fullmatch(tensor.name)
    module = _MODULE.fullmatch(lora["module"]) if lora else None
    if lora is None or module is None:
        return None
    target, layer = module["target"], int(module["layer"])
    if target not in base.targets or PARENTS[target] != module["parent"]:
        return None
    if layer >= base.num_layers:
        raise refuse(
            "layer_out_of_range",
            f"{printable(tensor.name)} is of layer {layer}, the base model has {base.num_layers} layers from 0 on",
            field="tensors",
            value=layer,
            remedy="push it for the base model that it was trained on",
        )
    ours = f"model.layers.{layer}.{PARENTS[target]}.{target}"
    names = (ours,) if lora["module"] == ours else (lora["module"], ours)
    return PlacedTensor(tensor=tensor, layer=layer, target=target, part=lora["part"], module_names=names)


def _refuse_by_sign(tensor: TensorEntry) -> None:
    shown = printable(tensor.name)
    for sign, code, what, remedy in _SIGNS:
        if sign in tensor.name:
            raise refuse(code, f"{shown} is {what}, which is not served", field="tensors", value=tensor.name, remedy=remedy)
    if tensor.name.endswith(".bias"):
        raise refuse("bias", f"{shown} is a trained bias", field="tensors", value=tensor.name, remedy="train with bias='none'")
    if tensor.name.startswith("base_model.model.") and "lora_" not in tensor.name:
        problem = f"{shown} is a whole module, trained beside the LoRA"
        remedy = MUST_BE_OFF["modules_to_save"][2]
        raise refuse("modules_to_save", problem, field="tensors", value=tensor.name, remedy=remedy)


def _refuse_all(strays: list[TensorEntry], base: BaseSpec) -> None:
    seen = f"such as {printable(strays[0].name)}" if strays else "for the file has none"
    raise refuse(
        "no_target_matches",
        f"no tensor belongs to a target of the base model ({base.model_type}), {seen}",
        field="tensors",
        value=strays[0].name if strays else None,
        remedy=f"push an adapter that targets some of {', '.join(TARGETS)}",
    )


def _refuse_stray(tensor: TensorEntry, base: BaseSpec) -> None:
    raise refuse(
        "unmatched_tensor",
        f"{printable(tensor.name)} belongs to no target of the base model ({base.model_type})",
        field="tensors",
        value=tensor.name,
        remedy=f"targets are {', '.join(TARGETS)}; names are as save_pretrained of PEFT writes them",
    )
