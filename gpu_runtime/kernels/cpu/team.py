"""Owns the helper threads of the CPU backend: one pool, asleep between steps, never spinning outside a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[int], None]


class Team:
    """`size` threads counting the caller. `run(work)` calls work(0) here and work(i) on helper i, if it wakes in time.

    `work` must share itself out by `sync` phases: `run` returns when work(0) does, and a helper that comes later finds
    nothing left to claim. Helpers hold no lock while they compute.
    """

    def __init__(self, size: int) -> None:
        assert size >= 1, f"a team has at least its caller, not {size} threads"
        self.size = size
        self._inboxes: list[SimpleQueue[Work]] = [SimpleQueue() for _ in range(size - 1)]
        for index, inbox in enumerate(self._inboxes, start=1):
            threading.Thread(target=_help, args=(index, inbox), name=f"lorary-kernels-{index}", daemon=True).start()

    def run(self, work: Work) -> None:
        for inbox in self._inboxes:
            inbox.put(work)
        work(0)


def _help(index: int, inbox: SimpleQueue[Work]) -> None:
    while True:
        inbox.get()(index)
