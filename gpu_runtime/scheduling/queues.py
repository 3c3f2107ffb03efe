"""Who waits and who runs, both in order of arrival. Knows nothing of pages or adapters."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from gpu_runtime.adapters.handle import Handle
from gpu_runtime.core import Request, RequestState


@dataclass(eq=False)
class Ticket:
    """A request's place: `order` is its arrival number and never changes, so a preempted request keeps its place.

    `seed` decides its samples together with the position, whatever batch it is in.
    """

    request: Request
    order: int
    grant: str | None
    seed: int
    handle: Handle | None = None


class Queue:
    """Tickets in order of arrival, by request id as well."""

    def __init__(self, state: RequestState) -> None:
        self._state = state
        self._tickets: list[Ticket] = []
        self._by_id: dict[str, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        """Over a copy: the caller may add and remove on the way."""
        return iter(self._tickets.copy())

    def __contains__(self, ticket: Ticket) -> bool:
        return self._by_id.get(ticket.request.request_id) is ticket

    def find(self, request_id: str) -> Ticket | None:
        return self._by_id.get(request_id)

    def add(self, ticket: Ticket) -> None:
        assert ticket.request.request_id not in self._by_id, f"{ticket.request.request_id} is queued twice"
        insort(self._tickets, ticket, key=lambda other: other.order)
        self._by_id[ticket.request.request_id] = ticket
        ticket.request.state = self._state

    def remove(self, ticket: Ticket) -> None:
        del self._by_id[ticket.request.request_id]
        self._tickets.remove(ticket)

    @property
    def youngest(self) -> Ticket:
        return self._tickets[-1]

    def check_integrity(self) -> None:
        orders = [ticket.order for ticket in self._tickets]
        assert orders == sorted(set(orders)), f"a queue is out of order: {orders}"
        assert len(self._by_id) == len(self._tickets), "a ticket is lost"
        for ticket in self._tickets:
            assert ticket.request.state is self._state, f"{ticket.request.request_id} is {ticket.request.state} in queue {self._state}"
