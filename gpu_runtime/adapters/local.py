"""A source without a registry: adapters in local folders, for benches, tests and a runtime on its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_runtime.adapters.source import AdapterUnavailable, Sink
from gpu_runtime.core import AdapterKey
from registry.artifact.digest import sha256_file
from registry.artifact.manifest import FORM_BLOBS, BlobRef, FormManifest

CHUNK_BYTES = 1 << 20


class LocalSource:
    """Serves the folders that `add` has named. `base_digest`: of the base model that they were made for."""

    def __init__(self, *, base_digest: str) -> None:
        self._base_digest = base_digest
        self._forms: dict[AdapterKey, tuple[FormManifest, dict[str, Path]]] = {}

    def add(self, folder: Path, *, tenant: str) -> AdapterKey:
        """The key of the adapter in `folder`. Raises OSError where a file is missing."""
        paths = {name: folder / name for name in FORM_BLOBS["raw"]}
        blobs = {name: BlobRef(sha256_file(path), path.stat().st_size) for name, path in paths.items()}
        manifest = FormManifest(base_digest=self._base_digest, blobs=blobs)
        key = AdapterKey(tenant, manifest.digest)
        self._forms[key] = (manifest, {blobs[name].sha256: path for name, path in paths.items()})
        return key

    def describe(self, key: AdapterKey, *, grant: str | None) -> tuple[Mapping[str, Any], str]:  # noqa: ARG002 - folders need no permission
        """(manifest, form digest in place of a version digest: a folder has no versions)."""
        manifest, _ = self._find(key)
        return manifest.to_json(), manifest.digest

    def fetch(self, key: AdapterKey, sha256: str, into: Sink, *, grant: str | None) -> None:  # noqa: ARG002
        """Copy a file."""
        _, paths = self._find(key)
        try:
            with paths[sha256].open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    into.write(chunk)
        except OSError as error:
            raise AdapterUnavailable(f"form {key.form_digest} cannot be read: {error.strerror}", retryable=True) from error

    def _find(self, key: AdapterKey) -> tuple[FormManifest, dict[str, Path]]:
        if key not in self._forms:
            raise AdapterUnavailable(f"form {key.form_digest} is unknown here", retryable=False)
        return self._forms[key]
