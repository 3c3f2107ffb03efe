"""Owns the helper threads of the CPU backend: one pool, asleep between steps, never spinning outside a step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue

Work = Callable[[int], None]
Inbox = SimpleQueue[Work | None]


class Team:
    """`size` threads counting the caller. `run(work)` calls work(0) here and work(i) on helper i, if it wakes in time.

    `work` must share itself out by `sync` phases: `run` returns when work(0) does, and a helper that comes later finds
    nothing left to claim. Helpers hold no lock while they compute.
    """

    def __init__(self, size: int) -> None:
        assert size >= 1, f"a team has at least its caller, not {size} threads"
        self.size = size
        self._inboxes: list[Inbox] = [SimpleQueue() for _ in range(size - 1)]
        for index, inbox in enumerate(self._inboxes, start=1):
            threading.Thread(target=_help, args=(index, inbox), name=f"lorary-kernels-{index}", daemon=True).start()
        weakref.finalize(self, _dismiss, self._inboxes)

    def run(self, work: Work) -> None:
        for inbox in self._inboxes:
            inbox.put(work)
        work(0)


def _help(index: int, inbox: Inbox) -> None:
    while (work := _newest(inbox)) is not None:
        work(index)
        del work  # or its buffers would live on until the next step


def _newest(inbox: Inbox) -> Work | None:
    """Waits for work. What was asked before the last request is done already."""
    work = inbox.get()
    while work is not None and not inbox.empty():
        work = inbox.get()
    return work


def _dismiss(inboxes: Sequence[Inbox]) -> None:
    for inbox in inboxes:
        inbox.put(None)
