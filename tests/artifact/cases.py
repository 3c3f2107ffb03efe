"""The golden table of the gate: every kind of adapter that is taken, and every kind that is refused, with its sentence."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from registry.artifact.base import TARGETS
from tests.generate import GeneratedAdapter, generate_adapter, safetensors_bytes, tiny_base, with_header

BASE = tiny_base()
MAX_RANK = 16

BARE = "base_model.model."  # the keys of an adapter that was trained on the model without its head
TEXT_HALF = "base_model.model.model.language_model."


def make(**options: Any) -> GeneratedAdapter:
    return generate_adapter(BASE, **options)


ACCEPTED: dict[str, GeneratedAdapter] = {
    "f32": make(dtype="F32"),
    "f16": make(dtype="F16"),
    "bf16": make(dtype="BF16"),
    "all seven targets": make(targets=TARGETS),
    "one target": make(targets=("down_proj",)),
    "rank 1": make(rank=1),
    "rank at the limit": make(rank=MAX_RANK),
    "rank_pattern by target": make(rank_pattern={"q_proj": 7, "v_proj": 2}),
    "rank_pattern by full name, as EVA writes it": make(
        rank_pattern={"model.layers.0.self_attn.q_proj": 6, "model.layers.1.self_attn.q_proj": 3},
    ),
    "rank_pattern by expression, first match wins": make(rank_pattern={r"layers\.0\..*": 3, "q_proj": 5}),
    "rank_pattern with lookahead": make(rank_pattern={r"(?!.*k_proj).*_proj": 6}),
    "rank_pattern that meets nothing": make(rank_pattern={"c_attn": 9}),
    "alpha_pattern": make(alpha_pattern={"k_proj": 1, r"\d+\.self_attn\.v_proj": 12.5}),
    "rank_pattern and alpha_pattern": make(rank_pattern={"q_proj": 7}, alpha_pattern={"q_proj": 3, ".*_proj": 1}),
    "rslora": make(rslora=True),
    "rslora with patterns": make(rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 2}),
    "fractional alpha": make(alpha=2.5),
    "targets as list of full names": make(
        targets=("q_proj",), target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    ),
    "targets as list of partial names": make(targets=("q_proj", "up_proj"), target_modules=["self_attn.q_proj", "mlp.up_proj"]),
    "targets as expression": make(targets=("q_proj", "v_proj"), target_modules=r".*\.self_attn\.(q|v)_proj"),
    "targets as expression with lookaround": make(
        targets=("q_proj", "down_proj"), target_modules=r"^(?!.*visual).*(?<=\.)(?:\bq_proj|down_proj)$"
    ),
    "targets as all-linear": make(targets=TARGETS, target_modules="all-linear"),
    "targets as All-Linear": make(targets=TARGETS, target_modules="All-Linear"),
    "layers_to_transform": make(layers=[1], layers_to_transform=[1]),
    "layers_to_transform, one number": make(layers=[0], layers_to_transform=0, layers_pattern="layers"),
    "exclude_modules": make(targets=("q_proj", "v_proj"), target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=["k_proj"]),
    "exclude_modules as expression": make(targets=TARGETS[:4], target_modules="all-linear", exclude_modules=r".*\.mlp\..*"),
    "without model. in the names": make(prefix=BARE, task_type="FEATURE_EXTRACTION"),
    "without model. in the names, by expression": make(
        prefix=BARE,
        targets=("q_proj",),
        target_modules=r"layers\.\d\.self_attn\.q_proj",
        rank_pattern={r"^layers\.1\..*": 2},
        task_type="FEATURE_EXTRACTION",
    ),
    "init false": make(init_lora_weights=False),
    "init gaussian": make(init_lora_weights="gaussian"),
    "init eva": make(init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99}),
    "init orthogonal": make(init_lora_weights="orthogonal"),
    "init mica": make(init_lora_weights="mica"),
    "fan_in_fan_out null": make(fan_in_fan_out=None),
    "dropout": make(lora_dropout=0.1),
    "a pinned revision": make(revision="main"),
    "another task type": make(task_type="SEQ_2_SEQ_LM"),
}

# Taken by us and refused, warned about or read otherwise by PEFT 0.21 itself; the comparison with PEFT leaves them out.
ACCEPTED_BEYOND_PEFT: dict[str, GeneratedAdapter] = {
    "bias null": make(bias=None),
    "init null": make(init_lora_weights=None),
    "a layer left out": make(layers=[1]),
    "velora was used in training": make(velora_config={"num_groups": 2}),
    "a file of PEFT 0.2": make(merge_weights=False, enable_lora=None),
    "old file: most keys absent": make().with_config(
        **dict.fromkeys(("alpha_pattern", "rank_pattern", "use_rslora", "bias", "init_lora_weights", "use_dora"), ...)
    ),
    "targets null, so inferred": make().with_config(target_modules=None),
    "training-only configs": make(
        corda_config={"beta": 1}, lora_ga_config={}, loftq_config={"loftq_bits": 4}, megatron_config={"a": 1}, ensure_weight_tying=True
    ),
    "text half of a multimodal model": make(prefix=TEXT_HALF),
    "names left over from memory": dataclasses.replace(
        make(), tensors={name.replace(".weight", ".default.weight"): value for name, value in make().tensors.items()}
    ),
    "B of zeros, as before training": make().with_tensors(
        **{name: np.zeros_like(value) for name, value in make().tensors.items() if "lora_B" in name}
    ),
}


@dataclass(frozen=True)
class Refused:
    """`files` is what is pushed; `sentence` is the whole detail."""

    code: str
    sentence: str
    files: dict[str, bytes]
    options: dict[str, Any] = field(default_factory=dict)


def header_file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return with_header(raw, data)


def entry(start: int, end: int, *, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def weights(data: bytes, config: bytes | None = None) -> dict[str, bytes]:
    return {"adapter_config.json": config or GOOD.config_bytes, "adapter_model.safetensors": data}


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path != name}


GOOD = make()
Q0A, Q0B = GOOD.name(0, "q_proj", "A"), GOOD.name(0, "q_proj", "B")
GOOD_WEIGHTS = GOOD.weights_bytes
_SHAPE_A, _SHAPE_B = GOOD.tensors[Q0A].shape, GOOD.tensors[Q0B].shape


def filled(value: float, *, dtype: str = "F32") -> dict[str, bytes]:
    """One value of one B is `value`."""
    adapter = make(dtype=dtype)
    changed = adapter.tensors[Q0B].copy()
    changed[3, 1] = value
    return adapter.with_tensors(**{Q0B: changed}).files


def mixed_dtypes() -> bytes:
    a, b = GOOD.tensors[Q0A], GOOD.tensors[Q0B].astype("<f2")
    first, second = a.nbytes, a.nbytes + b.nbytes
    header = {Q0A: entry(0, first, shape=list(a.shape)), Q0B: entry(first, second, shape=list(b.shape), dtype="F16")}
    return header_file(header, a.tobytes() + b.tobytes())


def all_int8() -> bytes:
    a, b = GOOD.tensors[Q0A].astype("i1"), GOOD.tensors[Q0B].astype("i1")
    first, second = a.nbytes, a.nbytes + b.nbytes
    header = {Q0A: entry(0, first, shape=list(a.shape), dtype="I8"), Q0B: entry(first, second, shape=list(b.shape), dtype="I8")}
    return header_file(header, a.tobytes() + b.tobytes())


def renamed(old: str, new: str, adapter: GeneratedAdapter = GOOD) -> dict[str, bytes]:
    return adapter.with_tensors(**{old: ..., new: adapter.tensors[old]}).files


def added(name: str, *shape: int) -> dict[str, bytes]:
    return GOOD.with_tensors(**{name: np.ones(shape, np.float32)}).files


def config(**changes: Any) -> dict[str, bytes]:
    return GOOD.with_config(**changes).files


def raw_config(data: bytes) -> dict[str, bytes]:
    return weights(GOOD_WEIGHTS, data)


def gpt2() -> dict[str, bytes]:
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    tensors = {name.format("A"): np.ones((4, 64), np.float32), name.format("B"): np.ones((192, 4), np.float32)}
    return weights(safetensors_bytes(tensors), GOOD.with_config(target_modules=["c_attn"]).config_bytes)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("never",)


PICKLE = pickle.dumps(_Bomb(), protocol=2)
