"""PEFT's LoRA on disk: what adapter_config.json means, and which tensor is which matrix.

delta of a target = scale * B @ A, A (rank, in), B (out, rank). This file alone knows `r` and `lora_alpha`; whoever calls
gets `rank`, read from the shapes, and `scale`, with patterns and rslora resolved. Pushed bytes are never rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from registry.artifact.base import TARGETS, BaseSpec
from registry.artifact.errors import ArtifactRefused, printable
from registry.artifact.header import SafetensorsHeader, TensorEntry
from registry.artifact.patterns import PatternSet
from registry.artifact.schema import refuse, require_plain_lora
from registry.artifact.strict_json import load_object
from registry.artifact.tensor_names import PlacedTensor, place_tensors

MAX_CONFIG_BYTES = 256 * 2**10
MAX_CONFIG_RANK = 2**16
MAX_ENTRIES = 8192
DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class PeftConfig:
    """What the weights need from adapter_config.json. `targets` is a list of names, an expression, or None (infer)."""

    r: int
    lora_alpha: float
    use_rslora: bool
    targets: tuple[str, ...] | str | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_narrowed: bool  # exclude_modules or layers_to_transform: fewer tensors than targets are expected
    base_model_name: str | None
    revision: str | None

    @property
    def alpha(self) -> float:
        """As published, for people: what it means stands in the scales of a layout."""
        return self.lora_alpha

    @property
    def targets_all_linear(self) -> bool:
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"


def parse_config(data: bytes) -> PeftConfig:
    """Read adapter_config.json against the closed schema. Raises ArtifactRefused, and nothing else."""
    if len(data) > MAX_CONFIG_BYTES:
        remedy = f"keep it under {MAX_CONFIG_BYTES} bytes"
        raise refuse("file_too_large", f"it has {len(data)} bytes", field="adapter_config.json", value=len(data), remedy=remedy)
    fields = load_object(data, field="adapter_config.json")
    require_plain_lora(fields)
    _require_narrowing_of_a_list(fields)
    return PeftConfig(
        r=_integer(fields["r"], name="r"),
        lora_alpha=_positive(fields["lora_alpha"], name="lora_alpha"),
        use_rslora=_flag(fields.get("use_rslora"), name="use_rslora"),
        targets=_targets(fields.get("target_modules")),
        rank_pattern={key: _integer(value, name=f"rank_pattern[{key[:80]}]") for key, value in _pattern(fields, "rank_pattern")},
        alpha_pattern={key: _positive(value, name=f"alpha_pattern[{key[:80]}]") for key, value in _pattern(fields, "alpha_pattern")},
        is_narrowed=any(fields.get(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform")),
        base_model_name=_text(fields.get("base_model_name_or_path"), name="base_model_name_or_path"),
        revision=_text(fields.get("revision"), name="revision"),
    )


def _bad_value(name: str, value: object, wanted: str) -> ArtifactRefused:
    remedy = "correct it, or save the adapter again with save_pretrained of PEFT"
    return refuse("bad_value", f"{printable(repr(value))[:80]} is not {wanted}", field=name, value=value, remedy=remedy)


def _integer(value: object, *, name: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_CONFIG_RANK:
        raise _bad_value(name, value, f"an integer between 1 and {MAX_CONFIG_RANK}")
    return value


def _positive(value: object, *, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1e6:  # type: ignore[operator]
        raise _bad_value(name, value, "a number above 0 and at most 1e6")
    return float(value)  # type: ignore[arg-type]


def _flag(value: object, *, name: str) -> bool:
    if value is not None and type(value) is not bool:
        raise _bad_value(name, value, "true or false")
    return bool(value)


def _text(value: object, *, name: str) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > 1024):
        raise _bad_value(name, value, "a short string or null")
    return value or None


def _targets(value: object) -> tuple[str, ...] | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    names = value if isinstance(value, list) else []
    if not names or len(names) > MAX_ENTRIES or not all(isinstance(name, str) and name for name in names):
        raise _bad_value("target_modules", value, "a list of module names, a regular expression or 'all-linear'")
    return tuple(names)


def _pattern(fields: Mapping[str, Any], name: str) -> Iterable[tuple[str, object]]:
    value = fields.get(name)
    if value is not None and (not isinstance(value, dict) or len(value) > MAX_ENTRIES):
        raise _bad_value(name, value, "an object of module patterns")
    return (value or {}).items()


def _require_narrowing_of_a_list(fields: Mapping[str, Any]) -> None:
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(fields.get("target_modules"), str) and fields.get(name) not in (None, [], ""):
            raise refuse(
                "bad_value",
                "PEFT does not take it beside a regular expression in target_modules",
                field=name,
                value=fields[name],
                remedy="say the layers inside the expression",
            )


@dataclass(frozen=True)
class LoraPair:
    """One target of one layer. `a` is (rank, in), `b` is (out, rank); delta = scale * B @ A."""

    layer: int
    target: str
    rank: int
    scale: float
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True)
class LoraLayout:
    """Every pair of an adapter, by layer and then in the order of TARGETS, all of one stored dtype."""

    pairs: tuple[LoraPair, ...]
    dtype: str  # "F32", "F16" or "BF16"

    @property
    def max_rank(self) -> int:
        return max(pair.rank for pair in self.pairs)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that at least one layer has, in the order of TARGETS."""
        present = {pair.target for pair in self.pairs}
        return tuple(target for target in TARGETS if target in present)

    @property
    def num_params(self) -> int:
        return sum(pair.a.num_elements + pair.b.num_elements for pair in self.pairs)

    @classmethod
    def resolve(cls, config: PeftConfig, header: SafetensorsHeader, base: BaseSpec, *, max_rank: int) -> LoraLayout:
        """Fit the tensors to the base model and the config to the tensors. Shape is truth.

        Raises ArtifactRefused: every tensor must belong to a pair, every pair to a target of the base model, and
        `target_modules`, `rank_pattern` and `r` must agree with what is there.
        """
        placed = place_tensors(header.tensors, base=base)
        dtype = _one_dtype(placed)
        resolver = _Resolver(config=config, base=base, max_rank=max_rank)
        pairs = tuple(resolver.pair(a, b) for a, b in _pairs(placed))
        resolver.require_every_target_used()
        return cls(pairs=pairs, dtype=dtype)


def _one_dtype(placed: Iterable[PlacedTensor]) -> str:
    dtypes = sorted({item.tensor.dtype for item in placed})
    for dtype in dtypes:
        if dtype not in DTYPES:
            remedy = "save the adapter in float32, float16 or bfloat16"
            raise refuse("unsupported_dtype", f"weights are stored as {dtype}", field="dtype", value=dtype, remedy=remedy)
    if len(dtypes) > 1:
        problem = f"weights are stored as {' and '.join(dtypes)}"
        raise refuse("mixed_dtypes", problem, field="dtype", value=dtypes, remedy="save every tensor in one dtype")
    return dtypes[0]


def _pairs(placed: Iterable[PlacedTensor]) -> list[tuple[PlacedTensor, PlacedTensor]]:
    """A and B of every place, in layout order."""
    by_place: dict[tuple[int, int], dict[str, PlacedTensor]] = {}
    for item in placed:
        parts = by_place.setdefault((item.layer, TARGETS.index(item.target)), {})
        if item.part in parts:
            names = f"{printable(item.tensor.name)} and {printable(parts[item.part].tensor.name)}"
            problem = f"{names} stand for one matrix"
            raise refuse("duplicate_tensor", problem, field="tensors", value=item.tensor.name, remedy="keep one of the two")
        parts[item.part] = item
    for parts in by_place.values():
        if len(parts) < 2:
            (item,) = parts.values()
            problem = f"{printable(item.tensor.name)} has no lora_{'B' if item.part == 'A' else 'A'} beside it"
            raise refuse("missing_pair", problem, field="tensors", value=item.tensor.name, remedy="save the whole adapter again")
    return [(parts["A"], parts["B"]) for _, parts in sorted(by_place.items())]


@dataclass
class _Resolver:
    """Rank and scale of one place after the other; remembers which entries of target_modules were met."""

    config: PeftConfig
    base: BaseSpec
    max_rank: int
    patterns: PatternSet = field(default_factory=PatternSet)
    used: set[str] = field(default_factory=set)

    def pair(self, a: PlacedTensor, b: PlacedTensor) -> LoraPair:
        self._require_targeted(a)
        rank = self._rank(a, b)
        names = a.module_names
        alpha = self._first(self.config.alpha_pattern, names, field="alpha_pattern", default=self.config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if self.config.use_rslora else rank)
        return LoraPair(layer=a.layer, target=a.target, rank=rank, scale=scale, a=a.tensor, b=b.tensor)

    def require_every_target_used(self) -> None:
        if not isinstance(self.config.targets, tuple) or self.config.is_narrowed:
            return
        for name in self.config.targets:
            if name not in self.used:
                raise refuse(
                    "target_without_tensors",
                    f"it names {printable(name)[:80]}, for which the file has no tensors",
                    field="target_modules",
                    value=name,
                    remedy="take the name out, or save the whole adapter again",
                )

    def _rank(self, a: PlacedTensor, b: PlacedTensor) -> int:
        """Rank from the shapes, which must fit the base model, the limit and the config."""
        features_in, features_out = self.base.targets[a.target]
        rank = a.tensor.shape[0] if len(a.tensor.shape) == 2 else 0
        if rank < 1 or a.tensor.shape[1] != features_in:
            raise _wrong_shape(a.tensor, f"[rank, {features_in}]", self.base)
        if b.tensor.shape != (features_out, rank):
            raise _wrong_shape(b.tensor, f"[{features_out}, {rank}]", self.base)
        if rank > self.max_rank:
            problem = f"{printable(a.tensor.name)} has rank {rank}, at most {self.max_rank} is served"
            raise refuse("rank_too_large", problem, field="rank", value=rank, remedy="train with a smaller r, or raise the limit")
        said = self._first(self.config.rank_pattern, a.module_names, field="rank_pattern", default=self.config.r)
        if said != rank:
            problem = f"the config says rank {said} for {printable(a.tensor.name)}, whose shape says {rank}"
            raise refuse("rank_mismatch", problem, field="r", value=said, remedy="push the config that belongs to these weights")
        return rank

    def _first(self, pattern: Mapping[str, float], names: tuple[str, ...], *, field: str, default: float) -> float:
        for key, value in pattern.items():
            if any(self.patterns.suffix_match(key, name, field=field) for name in names):
                return value
        return default

    def _require_targeted(self, item: PlacedTensor) -> None:
        targets = self.config.targets
        if targets is None or self.config.targets_all_linear:
            return
        if isinstance(targets, str):
            found = any(self.patterns.full_match(targets, name, field="target_modules") for name in item.module_names)
        else:
            met = {suffix for name in item.module_names for suffix in _suffixes(name)} & set(targets)
            self.used |= met
            found = bool(met)
        if not found:
            raise refuse(
                "tensor_not_targeted",
                f"it leaves out {printable(item.tensor.name)}, so PEFT would not load that tensor",
                field="target_modules",
                value=item.tensor.name,
                remedy="push the config that belongs to these weights",
            )


def _suffixes(name: str) -> Iterable[str]:
    """`a.b.c`, `b.c`, `c`: every spelling under which a list of PEFT names the module."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _wrong_shape(tensor: TensorEntry, wanted: str, base: BaseSpec) -> ArtifactRefused:
    return refuse(
        "wrong_shape",
        f"{printable(tensor.name)} has shape {list(tensor.shape)}, the base model ({base.model_type}) needs {wanted}",
        field="tensors",
        value=list(tensor.shape),
        remedy="push it for the base model that it was trained on",
    )
