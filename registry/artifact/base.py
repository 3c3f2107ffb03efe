"""What an adapter must fit: a base model's shapes and its identity.

The base digest is sha256 of canonical JSON {"schema", "tensors": [[name, dtype, shape, sha256 of the bytes] by name],
"tokenizer": sha256 of the canonical tokenizer.json, "config": base_config.settings(config.json)} (DESIGN 2). It is equal
on any machine and under any sharding. Bytes are streamed, memory stays small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry.artifact.base_config import CONFIG_SUBSET, settings, sizes_of, text_config
from registry.artifact.digest import StreamHasher, canonical_json, read_chunks, sha256_hex
from registry.artifact.errors import ArtifactRefused
from registry.artifact.header import TensorEntry, parse_header
from registry.artifact.strict_json import load_object

__all__ = ["CONFIG_SUBSET", "PARENTS", "TARGETS", "BaseSpec", "compute_base_digest"]

# The order in which targets stand everywhere, and the block that each belongs to.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARENTS = {name: "self_attn" if name in TARGETS[:4] else "mlp" for name in TARGETS}

DIGEST_SCHEMA = 1
MAX_JSON_BYTES = 256 * 2**20


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
        return asdict(self) | {"targets": {name: list(features) for name, features in self.targets.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BaseSpec:
        """The inverse of `to_json`, for what we stored ourselves."""
        targets = {name: (int(value["targets"][name][0]), int(value["targets"][name][1])) for name in TARGETS}
        return cls(**{**value, "targets": targets})


def compute_base_digest(model_dir: Path) -> str:
    """Digest of a folder with config.json, tokenizer.json and *.safetensors.

    Raises ArtifactRefused for a missing or broken file and for a tensor that stands in two shards.
    """
    tensors = sorted(_tensor_rows(model_dir))
    for first, second in itertools.pairwise(tensors):
        if first[0] == second[0]:
            raise _bad_folder(f"the tensor {first[0][:80]!a} stands in two shards", value=first[0])
    content = {
        "schema": DIGEST_SCHEMA,
        "tensors": tensors,
        "tokenizer": sha256_hex(canonical_json(canonical_tokenizer(_read_json(model_dir / "tokenizer.json")))),
        "config": settings(_read_json(model_dir / "config.json")),
    }
    return sha256_hex(canonical_json(content))


def _tensor_rows(model_dir: Path) -> Iterator[tuple[str, str, list[int], str]]:
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise _bad_folder("it holds no *.safetensors", value=model_dir.name)
    for shard in shards:
        with shard.open("rb") as file:
            header = parse_header(file, file_size=shard.stat().st_size)
            for tensor in header.tensors:  # in the order of their bytes, so the file is read straight through
                hasher = StreamHasher()
                for chunk in read_chunks(file, limit=tensor.num_bytes):
                    hasher.update(chunk)
                _require_whole(tensor, hasher.size)
                yield tensor.name, tensor.dtype, list(tensor.shape), hasher.digest


def _require_whole(tensor: TensorEntry, size: int) -> None:
    if size != tensor.num_bytes:
        raise _bad_folder(f"a shard shrank while {tensor.name[:80]!a} was read", value=tensor.name)


def canonical_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Without padding and truncation (state of whoever saved it), and with merges as pairs (older files join them)."""
    kept = {key: value for key, value in tokenizer.items() if key not in {"padding", "truncation"}}
    model = kept.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        kept["model"] = model | {"merges": merges}
    return kept


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _bad_folder(f"{path.name} is absent", value=path.name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise _bad_folder(f"{path.name} is larger than {MAX_JSON_BYTES} bytes", value=path.name)
    return load_object(path.read_bytes(), field=path.name)


def _bad_folder(problem: str, *, value: object) -> ArtifactRefused:
    remedy = "give a folder with config.json, tokenizer.json and the *.safetensors of one model"
    return ArtifactRefused("bad_base_model", problem, field="base model", value=value, remedy=remedy)
