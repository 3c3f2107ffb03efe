"""One form's bytes in memory, and the check that they are what their digest says: the only gate between a source or a disk and the pool."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import AdapterKey
from registry.artifact.errors import ArtifactRefused
from registry.artifact.manifest import FormManifest


@dataclass(frozen=True)
class Form:
    """Verified bytes of one form, by blob name (`adapter_config.json`, `adapter_model.safetensors`)."""

    key: AdapterKey
    version_digest: str
    manifest: FormManifest
    blobs: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        return sum(len(blob) for blob in self.blobs.values())


def verify_manifest(key: AdapterKey, manifest: Mapping[str, Any]) -> FormManifest:
    """The manifest, if its digest is the form digest asked for. Raises AdapterUnavailable otherwise."""
    try:
        parsed = FormManifest.from_json(manifest)
    except ArtifactRefused as error:
        raise AdapterUnavailable(f"the manifest of form {key.form_digest} cannot be read: {error}", retryable=False) from error
    if parsed.digest != key.form_digest:
        raise AdapterUnavailable(f"form {key.form_digest} was asked for, but the manifest received is {parsed.digest}", retryable=True)
    return parsed


class BlobBuffer:
    """Collects one blob and hashes it on the way; never takes more bytes than the manifest declares."""

    def __init__(self, name: str, *, sha256: str, size: int) -> None:
        self._name = name
        self._sha256 = sha256
        self._size = size
        self._hasher = hashlib.sha256()
        self._data = bytearray()

    def write(self, data: bytes, /) -> int:
        """Raises AdapterUnavailable beyond the declared size."""
        if len(self._data) + len(data) > self._size:
            raise AdapterUnavailable(f"{self._name} has more than the {self._size} bytes that its manifest declares", retryable=True)
        self._hasher.update(data)
        self._data += data
        return len(data)

    def finish(self) -> bytes:
        """The blob. Raises AdapterUnavailable if it is short or has another sha256."""
        if len(self._data) != self._size:
            raise AdapterUnavailable(f"{self._name} has {len(self._data)} bytes; its manifest declares {self._size}", retryable=True)
        if self._hasher.hexdigest() != self._sha256:
            raise AdapterUnavailable(f"{self._name} has sha256 {self._hasher.hexdigest()}, not {self._sha256}", retryable=True)
        return bytes(self._data)
