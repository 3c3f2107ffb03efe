"""The seam between scheduling and merged mode: who decides sees only this of who does it."""

from __future__ import annotations

from typing import Protocol

from gpu_runtime.core import AdapterKey


class Merger(Protocol):
    """Adds one adapter into the weights in use, between steps, on the step thread. A schedule says by `merged` what it counts on.

    The scheduler calls `merge` before it hands out pages of the same step, so that what `can_merge` promised is still there;
    whoever runs the step may ask again for the mode that is on already.
    """

    merged: AdapterKey | None  # whose weights the model reads now; None: the base model's
    merge_s: float  # spent on writing merged weights since the start

    def can_merge(self, key: AdapterKey) -> bool:
        """Whether `merge(key)` would find the adapter here and room for its copy."""
        ...

    def merge(self, key: AdapterKey) -> None:
        """The model reads `key`'s merged weights from the next step on; nothing where it does already. Only after `can_merge`."""
        ...

    def unmerge(self) -> None:
        """The model reads the base weights again; nothing where it does already."""
        ...
