"""A bound on how long anybody is passed over: credits, in seconds (the word is dLoRA's, OSDI'24 section 5.1; the rule is not).

dLoRA moves credits between adapters by constants, so that its guard fires after minutes (its scheduler.py: +1e4 at 0.11 a
step). Here a request's credit is the time that it lost against first come, first served:

    a step that leaves out somebody at or before it in favour of somebody behind it     all of the step
    a step that only changes the order before it                                         what the step was slower than FCFS

and `owed` says when the next such step would lose somebody more than `max_wait_s`: then the step must be FCFS, which loses
nobody anything. So no request ends later than `max_wait_s`, and a step, after FCFS would have ended it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Credits(Generic[T]):
    """Of everything in the queue, by whatever names it."""

    def __init__(self, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._credit_s: dict[T, float] = {}

    def of(self, ticket: T) -> float:
        """Seconds lost so far."""
        return self._credit_s.get(ticket, 0.0)

    @property
    def largest_s(self) -> float:
        return max(self._credit_s.values(), default=0.0)

    def owed(self, queue: Sequence[T], batch: Collection[T], *, step_s: float, num_places: int) -> bool:
        """Whether a step of `step_s` with `batch` would lose anybody in `queue` (in order) more than the bound."""
        start, end = _passed_over(queue, batch, num_places=num_places)
        return any(self.of(ticket) + step_s > self.max_wait_s for ticket in queue[start:end] if ticket not in batch)

    def settle(self, queue: Sequence[T], batch: Collection[T], *, took_s: float, slower_s: float, num_places: int) -> None:
        """A step with `batch` took so long, `slower_s` more than FCFS needs for as much work."""
        start, end = _passed_over(queue, batch, num_places=num_places)
        for ticket in queue[start:end]:
            if ticket not in batch:
                self._credit_s[ticket] = self.of(ticket) + took_s
        if slower_s > 0:
            for ticket in queue[end:]:
                self._credit_s[ticket] = self.of(ticket) + slower_s

    def forget(self, ticket: T) -> None:
        """It has ended."""
        self._credit_s.pop(ticket, None)


def _passed_over(queue: Sequence[T], batch: Collection[T], *, num_places: int) -> tuple[int, int]:
    """[start, end) of the queue: from the first whom FCFS would run and this batch does not, to the last whom it runs instead."""
    start = next((at for at, ticket in enumerate(queue[:num_places]) if ticket not in batch), None)
    if start is None:
        return 0, 0
    end = next((at for at in range(len(queue) - 1, start, -1) if queue[at] in batch), start)
    return start, end
