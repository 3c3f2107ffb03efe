"""Manifests: the JSON that names a version's or a form's content, and the digest over it.

version digest = sha256 of {"files":[{"path","sha256","size"} by path],"schema":1}
form digest    = sha256 of {"base_digest","blobs":{role: {"sha256","size"}},"kind","schema":1}

Both in canonical JSON. Closed: `from_json` refuses every key that it does not know, so an old reader never takes a
newer manifest for something it is not. A further kind of form adds its entry to FORM_BLOBS and its own fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from registry.artifact.digest import canonical_json, is_digest, sha256_hex
from registry.artifact.errors import ArtifactRefused

SCHEMA = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORM_BLOBS: dict[str, frozenset[str]] = {"raw": frozenset({CONFIG_FILE, WEIGHTS_FILE})}
MAX_FILES = 64
MAX_SIZE = 2**53 - 1  # the largest integer that every JSON reader keeps

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def require_safe_path(path: str) -> None:
    """Relative, ASCII letters, digits and ._- only, no part that starts with a dot. Raises ArtifactRefused."""
    if len(path) > 255 or _PATH.fullmatch(path) is None:
        raise ArtifactRefused(
            "unsafe_path",
            f"the file name {path[:80]!a} is not a plain relative name",
            field="files",
            value=path,
            remedy="use letters, digits, '.', '_' and '-' inside the adapter's own folder",
        )


def _refuse(problem: str, *, field: str, value: object = None) -> ArtifactRefused:
    remedy = "send a manifest as this version of the registry writes it"
    return ArtifactRefused("bad_manifest", problem, field=field, value=value, remedy=remedy)


def _require_blob(sha256: object, size: object, *, field: str) -> None:
    if not is_digest(sha256):
        raise _refuse(f"sha256 is {str(sha256)[:80]!a}, not 64 lowercase hex digits", field=field, value=sha256)
    if type(size) is not int or not 0 <= size <= MAX_SIZE:
        raise _refuse(f"size is {str(size)[:40]!a}, not a number of bytes", field=field, value=size)


def _require_keys(value: object, keys: set[str], *, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse("it is not a JSON object", field=field, value=value)
    if set(value) != keys:
        raise _refuse(f"its keys are {sorted(map(str, value))}, not {sorted(keys)}"[:300], field=field, value=sorted(map(str, value)))
    return value


def _require_schema(schema: object) -> None:
    if type(schema) is not int or schema != SCHEMA:
        raise _refuse(f"schema is {str(schema)[:40]!a}, this version reads {SCHEMA}", field="schema", value=schema)


@dataclass(frozen=True)
class BlobRef:
    """Bytes under their digest; size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        _require_blob(self.sha256, self.size, field="blob")

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": self.size}


@dataclass(frozen=True)
class FileEntry:
    """One pushed file: safe relative path, digest, size in bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise _refuse("path is not a string", field="files", value=self.path)
        require_safe_path(self.path)
        _require_blob(self.sha256, self.size, field=f"files[{self.path}]")

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256, "size": self.size}


@dataclass(frozen=True)
class VersionManifest:
    """What a tenant pushed, file by file, byte for byte. Raises ArtifactRefused for no, too many or repeated paths."""

    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        paths = [entry.path for entry in self.files]
        if not 1 <= len(paths) <= MAX_FILES:
            raise _refuse(f"{len(paths)} files, between 1 and {MAX_FILES} are taken", field="files", value=len(paths))
        if len(set(paths)) != len(paths):
            raise _refuse("a path stands twice", field="files", value=sorted(paths))
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda entry: entry.path)))

    @cached_property
    def digest(self) -> str:
        """The version digest."""
        return sha256_hex(canonical_json(self.to_json()))

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.files)

    def file(self, path: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.path == path), None)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "files": [entry.to_json() for entry in self.files]}

    @classmethod
    def from_json(cls, value: object) -> VersionManifest:
        """Raises ArtifactRefused for anything but what `to_json` makes."""
        fields = _require_keys(value, {"schema", "files"}, field="manifest")
        _require_schema(fields["schema"])
        if not isinstance(fields["files"], list):
            raise _refuse("files is not a list", field="files", value=fields["files"])
        entries = [_require_keys(item, {"path", "sha256", "size"}, field="files") for item in fields["files"]]
        return cls(files=tuple(FileEntry(**entry) for entry in entries))


@dataclass(frozen=True)
class FormManifest:
    """One form of a version: its kind, the base model it was made for, and its blobs by role.

    For kind `raw` the roles are the two files of the adapter, under the bytes that were pushed.
    """

    base_digest: str
    blobs: Mapping[str, BlobRef]
    kind: str = "raw"

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in FORM_BLOBS:
            raise _refuse(f"kind is {str(self.kind)[:40]!a}, known are {sorted(FORM_BLOBS)}", field="kind", value=self.kind)
        if not is_digest(self.base_digest):
            raise _refuse("base_digest is not 64 lowercase hex digits", field="base_digest", value=self.base_digest)
        if set(self.blobs) != FORM_BLOBS[self.kind]:
            raise _refuse(f"blobs of kind {self.kind} are {sorted(FORM_BLOBS[self.kind])}", field="blobs", value=sorted(self.blobs))
        object.__setattr__(self, "blobs", dict(sorted(self.blobs.items())))

    @cached_property
    def digest(self) -> str:
        """The form digest: with the tenant, the adapter's identity in the runtime."""
        return sha256_hex(canonical_json(self.to_json()))

    @property
    def size_bytes(self) -> int:
        return sum(blob.size for blob in self.blobs.values())

    def to_json(self) -> dict[str, Any]:
        blobs = {role: blob.to_json() for role, blob in self.blobs.items()}
        return {"schema": SCHEMA, "kind": self.kind, "base_digest": self.base_digest, "blobs": blobs}

    @classmethod
    def from_json(cls, value: object) -> FormManifest:
        """Raises ArtifactRefused for anything but what `to_json` makes."""
        fields = _require_keys(value, {"schema", "kind", "base_digest", "blobs"}, field="manifest")
        _require_schema(fields["schema"])
        if not isinstance(fields["blobs"], dict):
            raise _refuse("blobs is not a JSON object", field="blobs", value=fields["blobs"])
        blobs = {str(role): _require_keys(blob, {"sha256", "size"}, field="blobs") for role, blob in fields["blobs"].items()}
        refs = {role: BlobRef(**blob) for role, blob in blobs.items()}
        return cls(base_digest=fields["base_digest"], blobs=refs, kind=fields["kind"])

    @classmethod
    def raw(cls, version: VersionManifest, *, base_digest: str) -> FormManifest:
        """The raw form of a version; the version must hold the adapter's two files."""
        entries = [entry for entry in version.files if entry.path in FORM_BLOBS["raw"]]
        return cls(base_digest=base_digest, blobs={entry.path: BlobRef(entry.sha256, entry.size) for entry in entries})
