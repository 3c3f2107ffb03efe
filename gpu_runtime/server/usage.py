"""Finished requests that the registry has not heard of yet: remembered until it has acknowledged them.

What is in here when the process dies is lost: the registry then has what was reserved until the minute ends, and no usage
of those requests. A registry that is away is waited for, as long as the memory lasts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Literal, NamedTuple

from registry.wire import MAX_FINISHED, FinishedRequest

log = logging.getLogger(__name__)

MAX_WAITING = 50_000  # about 40 MB of grants; a busy replica fills it in minutes to hours
Outcome = Literal["finished", "cancelled", "failed"]
OUTCOMES: dict[int, Outcome] = {200: "finished", 499: "cancelled"}


class _Waiting(NamedTuple):
    grant: str
    outcome: Outcome
    num_prompt_tokens: int
    num_completion_tokens: int
    ended_s: float


class UsageBuffer:
    """Thread-safe. `add` by the event loop; `batch` and `settled` by the agent, which alone takes anything out.

    Beyond `max_waiting` the oldest are forgotten, and counted in `num_lost`.
    """

    def __init__(self, *, max_waiting: int = MAX_WAITING) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._max_waiting = max_waiting
        self._num_taken = 0  # how many of the oldest are in the batch on its way
        self.num_lost = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, grant: str, *, status: int, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        """`status` is HTTP's: 200 finished, 499 cancelled, anything else failed."""
        ended = _Waiting(grant, OUTCOMES.get(status, "failed"), num_prompt_tokens, num_completion_tokens, time.monotonic())
        with self._lock:
            self._waiting.append(ended)
            if len(self._waiting) <= self._max_waiting:
                return
            self._waiting.popleft()
            self._num_taken = max(0, self._num_taken - 1)
            self.num_lost += 1
            first = self.num_lost == 1
        if first:
            log.error("usage.lost", extra={"reason": f"more than {self._max_waiting} finished requests wait for the registry"})

    def batch(self) -> tuple[FinishedRequest, ...]:
        """The oldest ones, to be reported; they stay until `settled`."""
        with self._lock:
            taken = [self._waiting[index] for index in range(min(MAX_FINISHED, len(self._waiting)))]
            self._num_taken = len(taken)
        now = time.monotonic()
        return tuple(
            FinishedRequest(
                grant=one.grant,
                outcome=one.outcome,
                num_prompt_tokens=one.num_prompt_tokens,
                num_completion_tokens=one.num_completion_tokens,
                age_s=max(0.0, now - one.ended_s),
            )
            for one in taken
        )

    def settled(self) -> None:
        """The latest batch has been acknowledged."""
        with self._lock:
            for _ in range(self._num_taken):
                self._waiting.popleft()
            self._num_taken = 0

    def check_integrity(self) -> None:
        with self._lock:
            assert 0 <= self._num_taken <= len(self._waiting) <= self._max_waiting, "more is on its way than waits, or too much waits"
