"""Weighted fair share among tenants: virtual token counters (VTC, arXiv 2401.00588, algorithm 2). Pure.

A tenant's counter grows by what it was served, divided by its weight: a prompt token counts 1, an output token 2. Who waits
with the least counter is next. A tenant that comes back after idling is lifted to the least counter of those who are there:
idle time is not saved up. With one tenant this is first come, first served.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable

from gpu_runtime.core import Request
from gpu_runtime.scheduling.queues import Ticket

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


class FairShare:
    """`weight_of` a tenant: twice as much, twice the share. All alike where nobody says otherwise."""

    def __init__(self, weight_of: Callable[[str], float] = lambda _: 1.0) -> None:
        self._weight_of = weight_of
        self._counters: dict[str, float] = {}
        self._present: Counter[str] = Counter()  # requests in the engine

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def arrive(self, request: Request) -> None:
        """A request came. The first of its tenant lifts the tenant's counter."""
        tenant = request.tenant
        if not self._present[tenant]:
            least = min((self._counters[other] for other in self._present if other != tenant), default=self.counter(tenant))
            self._counters[tenant] = max(self.counter(tenant), least)
        self._present[tenant] += 1

    def leave(self, request: Request) -> None:
        """It has ended. Who is gone is remembered while its counter says more than a newcomer's would."""
        tenant = request.tenant
        self._present[tenant] -= 1
        if self._present[tenant] > 0:
            return
        del self._present[tenant]
        floor = min((self._counters[other] for other in self._present), default=None)
        for gone in [one for one in self._counters if one not in self._present]:
            if floor is None or self._counters[gone] <= floor:
                del self._counters[gone]

    def served(self, request: Request, *, start: int, end: int) -> None:
        """Tokens [start, end) of a request were computed; those of its output were made a step before."""
        num_prompt = len(request.prompt_ids)
        num_input = max(0, min(end, num_prompt) - start)
        num_output = end - start - num_input
        self._counters[request.tenant] += (INPUT_WEIGHT * num_input + OUTPUT_WEIGHT * num_output) / self._weight_of(request.tenant)

    def order(self, waiting: Iterable[Ticket]) -> list[Ticket]:
        """Who is next, as if each prompt were computed at once. `waiting` is in order of arrival."""
        lines: defaultdict[str, deque[Ticket]] = defaultdict(deque)
        for ticket in waiting:
            lines[ticket.request.tenant].append(ticket)
        if len(lines) <= 1:
            return [ticket for line in lines.values() for ticket in line]
        heap = [(self.counter(tenant), line[0].order, tenant) for tenant, line in lines.items()]
        heapq.heapify(heap)
        ordered = []
        while heap:
            counter, _, tenant = heapq.heappop(heap)
            ticket = lines[tenant].popleft()
            ordered.append(ticket)
            if lines[tenant]:
                counter += INPUT_WEIGHT * ticket.request.num_tokens / self._weight_of(tenant)
                heapq.heappush(heap, (counter, lines[tenant][0].order, tenant))
        return ordered

    def check_integrity(self) -> None:
        assert all(count > 0 for count in self._present.values()), f"a tenant has no requests: {self._present}"
        assert all(tenant in self._counters for tenant in self._present), "a tenant that is here has no counter"
