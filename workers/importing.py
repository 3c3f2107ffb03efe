"""Import of a base model: find its files, download or convert them once, take the digest and the shapes.

torch and transformers are imported for a GGUF alone. A converted or downloaded model appears under `<model_dir>/<base_digest>` by
one rename, after its files are on disk.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from registry.artifact.base import BaseSpec, compute_base_digest
from registry.artifact.errors import ArtifactRefused
from registry.base_models import service
from registry.base_models.service import Imported
from registry.db import WriteSession
from registry.jobs.service import Claim
from workers.shell import Attempt, Publish


class ImportRefused(Exception):
    """The source cannot be imported. `detail` names it and says what to do."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class ModelDownload(Protocol):
    """`hub_model.HubDownload`, which knows hubs; this file does not."""

    def folder(self, claim: Claim, attempt: Attempt) -> AbstractContextManager[Path]: ...


@dataclass(frozen=True)
class BaseModelImport:
    """The job of kind `import_base_model`; payload {base_model_id, source: {kind, location, ...}, secret_tenant_id}."""

    model_dir: Path
    hub: ModelDownload

    def run(self, claim: Claim, attempt: Attempt) -> Publish:
        base_model_id, source = claim.payload["base_model_id"], claim.payload["source"]
        try:
            found = self._import(source["kind"], source["location"], claim=claim, attempt=attempt)
        except (ArtifactRefused, ImportRefused) as refused:
            code, detail = refused.code, refused.detail
            return lambda session: {
                "outcome": service.publish_failed(session, base_model_id, code=code, detail=detail),
                "code": code,
            }
        attempt.check()
        return lambda session: {"outcome": service.publish_ready(session, base_model_id, found)}

    def give_up(self, session: WriteSession, _tenant_id: str | None, payload: Mapping[str, Any], code: str, detail: str) -> None:
        sentence = f"the base model could not be imported ({detail}); register it again to retry"
        service.publish_failed(session, payload["base_model_id"], code=code, detail=sentence)

    def _import(self, kind: str, location: str, *, claim: Claim, attempt: Attempt) -> Imported:
        if kind == "hub":
            return self._download(claim, attempt)
        if kind == "directory":
            return describe_directory(_absolute(location))
        file = find_packaged_gguf(location) if kind == "package" else _absolute(location)
        return self._convert(file, claim=claim)

    def _download(self, claim: Claim, attempt: Attempt) -> Imported:
        with self.hub.folder(claim, attempt) as folder:
            return self._move_into_place(folder, describe_directory(folder))

    def _convert(self, file: Path, *, claim: Claim) -> Imported:
        if not file.is_file():
            raise ImportRefused("source_missing", f"{file} is not a file; give the path of one .gguf file on the worker's machine")
        self.model_dir.mkdir(parents=True, exist_ok=True)
        for leftover in self.model_dir.glob(f".importing-{claim.job_id}-*"):  # of an attempt that died
            shutil.rmtree(leftover, ignore_errors=True)
        work = self.model_dir / f".importing-{claim.job_id}-{claim.fence}"
        try:
            convert_gguf(file, into=work)
            found = describe_directory(work)
            return self._move_into_place(work, found)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _move_into_place(self, work: Path, found: Imported) -> Imported:
        place = self.model_dir / found.base_digest
        if not place.is_dir():
            for path in (*work.rglob("*"), work):
                _sync(path)
            work.rename(place)
            _sync(self.model_dir)
        return Imported(base_digest=found.base_digest, location=str(place), spec=found.spec)


def describe_directory(folder: Path) -> Imported:
    """Digest and shapes of a folder with config.json, tokenizer.json and *.safetensors, read in place.

    Raises ImportRefused for no folder, ArtifactRefused for what its files are.
    """
    if not folder.is_dir():
        raise ImportRefused("source_missing", f"{folder} is not a directory; give the folder of one model on the worker's machine")
    digest = compute_base_digest(folder)
    spec = BaseSpec.from_config(json.loads((folder / "config.json").read_bytes()))
    return Imported(base_digest=digest, location=str(folder), spec=spec.to_json())


def find_packaged_gguf(package: str) -> Path:
    """The one `.gguf` file of an installed distribution or top-level module, which is not imported."""
    files = _distribution_files(package) or _module_files(package)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ImportRefused(
            "package_without_gguf", f"package {package!r} must ship exactly one .gguf file, found: {found}; install the right one"
        )
    return files[0]


def _distribution_files(package: str) -> list[Path]:
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]


def _module_files(package: str) -> list[Path]:
    # a dotted name would import its parents, so only top-level modules are looked at
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    return [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]


def convert_gguf(file: Path, *, into: Path) -> None:
    """Write the model of a GGUF as float32 safetensors with its tokenizer. Raises ImportRefused."""
    import torch  # noqa: PLC0415 - seconds and half a gigabyte that no other job needs
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    torch.set_num_threads(1)
    folder, name = str(file.parent), file.name
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError, OSError) as error:
        raise ImportRefused("gguf_unreadable", f"{file} cannot be read as a GGUF of a served family: {error}"[:500]) from error
    _forget_quantization(model)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _forget_quantization(model: Any) -> None:
    """The weights were dequantised on loading, but transformers would refuse to save them as what they are."""
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.hf_quantizer = None
    model.is_quantized = False


def _absolute(location: str) -> Path:
    path = Path(location)
    if not path.is_absolute():
        raise ImportRefused("source_relative", f"location {location!r} is relative; give an absolute path on the worker's machine")
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
