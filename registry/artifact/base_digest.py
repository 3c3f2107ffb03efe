"""The base digest: one name for a base model's behaviour, equal on any machine and under any sharding (DESIGN 2).

sha256 of canonical JSON {"schema", "tensors": [[name, dtype, shape, sha256 of the bytes] by name], "tokenizer": sha256
of the canonical tokenizer.json, "config": base.settings(config.json)}. Bytes are streamed, memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from registry.artifact.base import settings
from registry.artifact.digest import StreamHasher, canonical_json, read_chunks, sha256_hex
from registry.artifact.errors import ArtifactRefused
from registry.artifact.header import TensorEntry, parse_header
from registry.artifact.strict_json import load_object

SCHEMA = 1
MAX_JSON_BYTES = 256 * 2**20


def compute_base_digest(model_dir: Path) -> str:
    """Digest of a folder with config.json, tokenizer.json and *.safetensors.

    Raises ArtifactRefused for a missing or broken file and for a tensor that stands in two shards.
    """
    tensors = sorted(_tensor_rows(model_dir))
    names = [name for name, *_ in tensors]
    if len(set(names)) != len(names):
        twice = next(name for name, following in zip(names, names[1:], strict=False) if name == following)
        raise _bad_folder(f"the tensor {twice[:80]!a} stands in two shards", value=twice)
    content = {
        "schema": SCHEMA,
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
