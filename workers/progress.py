"""How far a copy is, for the job's row."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PROGRESS_EVERY_S = 1.0


@dataclass
class Progress:
    """Tells the job's row how far it is, not more often than once a second."""

    tell: Callable[[Mapping[str, Any]], None]
    total_bytes: int
    done_bytes: int = 0
    file: str = ""
    _told_at: float = field(default=0.0, repr=False)

    def advance(self, num_bytes: int) -> None:
        self.reach(self.done_bytes + num_bytes)

    def reach(self, done_bytes: int) -> None:
        """So far of all; less than before where bytes that had come must come again."""
        self.done_bytes = done_bytes
        if time.monotonic() - self._told_at >= PROGRESS_EVERY_S:
            self._told_at = time.monotonic()
            self.tell({"file": self.file, "done_bytes": self.done_bytes, "total_bytes": self.total_bytes})
