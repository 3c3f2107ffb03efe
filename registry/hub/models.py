"""What the Hub's words mean here. No tables: a repository is an adapter, a commit one of its ready versions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.adapters.models import AdapterVersion

COMMIT_LENGTH = 40


@dataclass(frozen=True)
class RepoFile:
    """One file of a commit. The Hub knows a large file by its sha256, and in git by the pointer to it; here every file is one."""

    path: str
    sha256: str
    size: int

    @property
    def pointer(self) -> bytes:
        """The git LFS pointer, https://git-lfs.com/spec v1."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def git_oid(self) -> str:
        """The id that git gives to the pointer: sha1 of its blob."""
        return hashlib.sha1(b"blob %d\0%s" % (len(self.pointer), self.pointer), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A ready version as the Hub's clients see it, with its adapter and base model loaded."""

    tenant: str
    version: AdapterVersion

    @property
    def repo_id(self) -> str:
        return f"{self.tenant}/{self.version.adapter.name}"

    @property
    def sha(self) -> str:
        """Git's ids are 40 hex digits and clients insist on that: the first 40 of the version digest."""
        return self.version.version_digest[:COMMIT_LENGTH]

    @property
    def files(self) -> list[RepoFile]:
        """In order of their paths. Every path is a plain name: the gate lets no folder into a version."""
        entries: list[Mapping[str, Any]] = self.version.manifest["files"]
        return sorted((RepoFile(entry["path"], entry["sha256"], entry["size"]) for entry in entries), key=lambda file: file.path)
