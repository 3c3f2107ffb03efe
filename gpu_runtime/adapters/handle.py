"""What a user of a resident adapter holds, and what ends when the last one lets go."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from gpu_runtime.core import AdapterKey
from gpu_runtime.memory.plan import AdapterPlan


class Drop:
    """Done when everything that it waits for is: handles back, flights landed, files gone (which a pull thread reports)."""

    def __init__(self) -> None:
        self.future: Future[None] = Future()
        self._lock = threading.Lock()
        self._remaining = 1

    def wait_for(self) -> None:
        with self._lock:
            self._remaining += 1

    def one_done(self) -> None:
        with self._lock:
            self._remaining -= 1
            last = self._remaining == 0
        if last:
            self.future.set_result(None)


@dataclass(eq=False)
class Resident:
    """An adapter in the pool. `last_used` grows with every use; `drop` is set once its pointer is gone."""

    key: AdapterKey
    slot: int
    pages: list[int]
    plan: AdapterPlan
    num_handles: int = 0
    last_used: int = 0
    drop: Drop | None = None

    def described(self) -> dict[str, Any]:
        """As plain values."""
        about = {"num_pages": len(self.pages), "rank": self.plan.rank, "num_handles": self.num_handles, "drains": self.drop is not None}
        return self.key._asdict() | about


@dataclass(eq=False)
class Handle:
    """One use of a resident adapter; its slot stays valid until it is released."""

    resident: Resident
    released: bool = False

    @property
    def slot(self) -> int:
        return self.resident.slot
