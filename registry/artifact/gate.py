"""The gate's first half: all that file names, config and header can refuse, inside the push request.

The second half, the values themselves, is `scan.py`, run by the job.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from registry.artifact.base import BaseSpec
from registry.artifact.errors import ArtifactRefused, printable
from registry.artifact.header import SafetensorsHeader, parse_header
from registry.artifact.lora import LoraLayout, PeftConfig, parse_config
from registry.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE, require_safe_path

README_FILE = "README.md"
SIGNATURE_FILE = "model.sig"  # as `model_signing` names it; what is in it is `registry/signing`'s matter
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".msgpack", ".h5"})


@dataclass(frozen=True)
class GateLimits:
    """Sizes in bytes. The header of the largest served adapter is some 200 kB."""

    config_bytes: int = 256 * 2**10
    readme_bytes: int = 2**20
    signature_bytes: int = 64 * 2**10
    weights_bytes: int = 16 * 2**30
    header_bytes: int = 4 * 2**20


DEFAULT_LIMITS = GateLimits()


@dataclass(frozen=True)
class Accepted:
    """An adapter that may be served once its values are scanned."""

    layout: LoraLayout
    header: SafetensorsHeader
    config: PeftConfig

    @property
    def rank(self) -> int:
        """The largest rank."""
        return self.layout.max_rank

    @property
    def targets(self) -> tuple[str, ...]:
        return self.layout.targets

    @property
    def num_params(self) -> int:
        return self.layout.num_params


def check_files(files: Mapping[str, int], *, limits: GateLimits = DEFAULT_LIMITS) -> None:
    """`files`: path -> size in bytes. Raises ArtifactRefused unless they are exactly what an adapter may hold."""
    allowed = {
        CONFIG_FILE: limits.config_bytes,
        WEIGHTS_FILE: limits.weights_bytes,
        README_FILE: limits.readme_bytes,
        SIGNATURE_FILE: limits.signature_bytes,
    }
    for path in sorted(files):
        require_safe_path(path)
        _refuse_pickle(path)
        if path not in allowed:
            remedy = f"push only {', '.join(allowed)}"
            raise _refuse("unexpected_file", f"{printable(path)} is no part of an adapter", value=path, remedy=remedy)
        if files[path] > allowed[path]:
            problem = f"{path} has {files[path]} bytes, at most {allowed[path]} are taken"
            raise _refuse("file_too_large", problem, value=files[path], remedy="push a smaller file")
    for path in (CONFIG_FILE, WEIGHTS_FILE):
        if path not in files:
            remedy = "push the folder that save_pretrained of PEFT wrote"
            raise _refuse("missing_file", f"{path} is absent", value=path, remedy=remedy)
        if files[path] == 0:
            raise _refuse("empty_file", f"{path} has no bytes", value=path, remedy="save the adapter again")


def _refuse(code: str, problem: str, *, value: object, remedy: str) -> ArtifactRefused:
    return ArtifactRefused(code, problem, field="files", value=value, remedy=remedy)


def _refuse_pickle(path: str) -> None:
    if PurePosixPath(path).suffix.lower() in PICKLES:
        remedy = f"save with safe_serialization=True and push {WEIGHTS_FILE}"
        raise _refuse("pickle", f"{path} is a format that can run code or is not read here", value=path, remedy=remedy)


def check_push(
    files: Mapping[str, int],
    *,
    config: bytes,
    weights: BinaryIO,
    weights_size: int,
    base: BaseSpec,
    base_names: Collection[str],
    max_rank: int,
    limits: GateLimits = DEFAULT_LIMITS,
) -> Accepted:
    """Judge a push without reading its values.

    `files`: path -> size in bytes; `config`: bytes of adapter_config.json; `weights` stands at its first byte.
    `base_names`: names under which the base model's publishers know it; the config's base_model_name_or_path must be one
    of them. Empty when the push named its base model itself: then shapes alone decide. Raises ArtifactRefused.
    """
    check_files(files, limits=limits)
    peft = parse_config(config)
    _require_base(peft, base_names)
    header = parse_header(weights, file_size=weights_size, max_header_bytes=limits.header_bytes)
    layout = LoraLayout.resolve(peft, header, base, max_rank=max_rank)
    return Accepted(layout=layout, header=header, config=peft)


def _require_base(peft: PeftConfig, base_names: Collection[str]) -> None:
    if not base_names or peft.base_model_name in base_names:
        return
    trained_on, ours = printable(peft.base_model_name or "no named model"), ", ".join(sorted(base_names))[:200]
    raise ArtifactRefused(
        "wrong_base_model",
        f"it was trained on {trained_on}, this base model is {ours}",
        field="base_model_name_or_path",
        value=peft.base_model_name,
        remedy="push it for its own base model, or name the base model in the push if they are the same",
    )
