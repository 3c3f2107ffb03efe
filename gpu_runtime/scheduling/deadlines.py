"""Early abort: a request whose first token cannot come before its deadline ends at once, so that others keep theirs. Pure.

What lies before a request is predicted by the cost model: each one ahead takes its prompt and its share of full steps. The
prediction is on the hopeful side: a request is ended for what is certain, not for what is likely. S-LoRA
(arXiv 2311.03285, section 6.1) estimates the load from how much the queue grew, in whole requests: growth is net of those that
left, and small rates are rounded to nothing. Here arrivals alone are counted, with decaying weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpu_runtime.core import Request
from gpu_runtime.scheduling.cost import StepCost
from gpu_runtime.scheduling.queues import Ticket

MEMORY_S = 30.0
HOPE = 0.8  # of the predicted queue wait, what is believed: requests end before their max_tokens
MAX_RETRY_S = 60


class ArrivalRate:
    """Arrivals a second, over about `memory_s`. Exact from the first one on: the time that it knows nothing of does not count."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._count = 0.0
        self._first_s: float | None = None
        self._last_s = 0.0

    def arrived(self, now_s: float) -> None:
        if self._first_s is None:
            self._first_s = now_s  # opens the window; what is counted comes after
        else:
            self._count = self._count * self._decay(now_s) + 1.0
        self._last_s = max(now_s, self._last_s)

    def per_s(self, now_s: float) -> float:
        if self._first_s is None or now_s <= self._first_s:
            return 0.0
        window_s = self._memory_s * -math.expm1(-(now_s - self._first_s) / self._memory_s)
        return self._count * self._decay(now_s) / window_s

    def _decay(self, now_s: float) -> float:
        return math.exp(-max(0.0, now_s - self._last_s) / self._memory_s)


@dataclass(frozen=True)
class Forecast:
    """What the cost model says of a queue. `num_places` requests a step, `max_step_tokens` tokens."""

    cost: StepCost
    num_places: int
    max_step_tokens: int

    def prefill_s(self, request: Request) -> float:
        """Until its first token, from when it runs, alone."""
        full_s, token_s = self.cost.full_step(self.num_places)
        num_steps = math.ceil(request.num_uncomputed / self.max_step_tokens)
        alone_s = max(0.0, full_s - self.num_places * token_s)
        return num_steps * alone_s + request.num_uncomputed * token_s

    def share_s(self, request: Request) -> float:
        """Of the engine's time, with every place taken."""
        full_s, token_s = self.cost.full_step(self.num_places)
        num_left = request.params.max_tokens - len(request.output_ids)
        return request.num_uncomputed * token_s + num_left * full_s / self.num_places

    def hopeless(self, line: Sequence[Ticket], *, num_free: int, now_s: float) -> list[Ticket]:
        """Of those who wait, in order, those who cannot have their first token in time; each makes room for those behind it."""
        late, ahead_s, num_ahead = [], 0.0, 0
        for ticket in line:
            wait_s = HOPE * ahead_s if num_ahead >= num_free else 0.0
            deadline_s = ticket.request.deadline_s
            if deadline_s is not None and not ticket.request.output_ids and now_s + wait_s + self.prefill_s(ticket.request) > deadline_s:
                late.append(ticket)
                continue
            num_ahead += 1
            if num_ahead > num_free:
                ahead_s += self.share_s(ticket.request)
        return late

    def retry_after_s(self, line: Iterable[Ticket], *, arrivals_per_s: float) -> int:
        """When the backlog will be gone, while requests go on coming at this rate. Between 1 and 60 seconds."""
        shares = [self.share_s(ticket.request) for ticket in line]
        if not shares:
            return 1
        idle = 1.0 - arrivals_per_s * sum(shares) / len(shares)
        return max(1, min(MAX_RETRY_S, math.ceil(sum(shares) / max(idle, 1e-3))))
