"""Canonical JSON and SHA-256: how anything of ours gets its name. Digests are bare lowercase hex, 64 characters."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: object) -> bytes:
    """The one UTF-8 spelling of a JSON value: keys sorted, no spaces, floats in shortest round-trip form.

    Raises ValueError for NaN and infinities, for lone surrogates and for keys that are not strings.
    """
    _require_string_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _require_string_keys(value: object) -> None:
    # json.dumps would turn 1 and True into "1" and "true": two values, one spelling.
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"canonical JSON needs string keys, got {key!r}")
            _require_string_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_string_keys(item)


def is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


class StreamHasher:
    """SHA-256 and size of bytes that pass by."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.size = 0

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        self._sha256.update(chunk)
        self.size += len(chunk)

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()


def sha256_file(path: Path) -> str:
    """Digest of a whole file, read in pieces."""
    hasher = StreamHasher()
    with path.open("rb") as file:
        for chunk in read_chunks(file):
            hasher.update(chunk)
    return hasher.digest


def read_chunks(file: BinaryIO, *, limit: int | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Pieces of `file` from where it stands, `limit` bytes in all (None: to the end). Ends early with the file."""
    left = limit
    while left is None or left > 0:
        chunk = file.read(chunk_bytes if left is None else min(left, chunk_bytes))
        if not chunk:
            return
        if left is not None:
            left -= len(chunk)
        yield chunk
