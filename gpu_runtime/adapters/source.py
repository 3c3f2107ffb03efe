"""Where adapters come from: the seam between residency and whatever holds the bytes (registry, folder).

A source is believed about nothing: the disk cache recomputes the form digest from the manifest and the sha256 of
every blob. Both methods are called from pull threads, never from the step loop, and may block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from gpu_runtime.core import AdapterKey


class AdapterUnavailable(Exception):
    """The adapter cannot be had now. `reason` is one sentence for the client.

    `retryable`: asking again later may help (registry away, disk full); otherwise it will not (deleted, malformed).
    """

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retryable = retryable


class Sink(Protocol):
    """Where a source writes a blob, in order. `write` raises AdapterUnavailable beyond the size that the manifest declares."""

    def write(self, data: bytes, /) -> int: ...


class AdapterSource(Protocol):
    """One form's manifest, then its blobs. Raises AdapterUnavailable for everything that can go wrong."""

    def describe(self, key: AdapterKey, *, grant: str | None) -> tuple[Mapping[str, Any], str]:
        """(form manifest as JSON object, version digest). `grant`: the signed permission of the request that asks first."""
        ...

    def fetch(self, key: AdapterKey, sha256: str, into: Sink, *, grant: str | None) -> None:
        """Write the whole blob `sha256` of this form into `into`, in chunks of bounded size."""
        ...
