"""Continuous batching with chunked prefill under a token budget. Pure: no clock, no model, no threads.

`planner.py` says who may run together, in which order and mode. Of those a step takes, in order: one token of every decoding
request, prompt chunks of running requests, then new requests while tokens and pages last. Who runs but is not in the plan
keeps its pages and pauses. A waiting request whose adapter is still on its way is passed by; one that merely does not fit
yet is not, so nobody starves. When a decode finds no page, idle adapters leave first, then the youngest request is
preempted: it keeps its place in the queue and is computed again, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from gpu_runtime.adapters.residency import Residency
from gpu_runtime.core import NO_SLOT, AdapterKey, Request, RequestState
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.scheduling.admission import Limits, admission_pages, headroom_pages
from gpu_runtime.scheduling.deadlines import ArrivalRate, Forecast
from gpu_runtime.scheduling.planner import Plan, Planner
from gpu_runtime.scheduling.prefixes import Prefixes
from gpu_runtime.scheduling.queues import Queue, Ticket


@dataclass(frozen=True, eq=False)
class Scheduled:
    """Compute tokens [start, end) of a request in this step; `samples` if the last one's logits choose its next token."""

    ticket: Ticket
    start: int
    end: int

    @property
    def request(self) -> Request:
        return self.ticket.request

    @property
    def samples(self) -> bool:
        return self.end == self.request.num_tokens


@dataclass(frozen=True, eq=False)
class Failed:
    """A request that ends without running (any further); what it held is free already."""

    request: Request
    reason: str
    retryable: bool
    retry_after_s: int = 1


@dataclass(frozen=True, eq=False)
class Schedule:
    """One step: what to compute, which requests ended on the way, and in which mode: `merged` None is unmerged.

    In merged mode every item's adapter is `merged`.
    """

    items: tuple[Scheduled, ...]
    failed: tuple[Failed, ...]
    merged: AdapterKey | None = None


class Scheduler:
    """Owns the queues and every KV page of the pool. All methods belong to the step thread."""

    def __init__(
        self,
        *,
        limits: Limits,
        layout: PageLayout,
        pool: PagePool,
        residency: Residency,
        planner: Planner,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.limits = limits
        self.prefixes = prefixes or Prefixes(pool, tokens_per_page=layout.tokens_per_page, enabled=False)
        residency.reclaimer.add(self.prefixes)
        self.waiting = Queue(RequestState.WAITING)
        self.running = Queue(RequestState.RUNNING)
        self.num_preemptions = 0
        self._layout = layout
        self._pool = pool
        self._residency = residency
        self._planner = planner
        self._arrivals = ArrivalRate()
        self._num_arrived = 0

    def require_possible(self, request: Request) -> None:
        """Raises ValueError for a request that could never run here."""
        pages = 0 if request.adapter is None else self._residency.num_pages(request.adapter) or 0
        self.limits.require_possible(request, layout=self._layout, num_adapter_pages=pages)

    def add(self, request: Request, *, grant: str | None, seed: int) -> None:
        """Queue a request; its adapter starts on its way now. Raises ValueError for one that could never run."""
        self.require_possible(request)
        if self.find(request.request_id) is not None:
            raise ValueError(f"request_id is {request.request_id!r}; a request of that id is in the queue")
        self.waiting.add(Ticket(request, self._num_arrived, grant, seed))
        self._num_arrived += 1
        self._arrivals.arrived(request.arrived_s)
        self._planner.fair.arrive(request)
        if request.adapter is not None:
            self._residency.want(request.adapter, grant=grant)

    def find(self, request_id: str) -> Ticket | None:
        return self.waiting.find(request_id) or self.running.find(request_id)

    def schedule(self, now_s: float) -> Schedule:
        """The next step, with pages and handles of everything in it already taken, and the weights switched to its mode."""
        failed = [*self._fail_pulls(), *self._expire(now_s)]
        plan = self._planner.plan(self._line_up(failed), ranks=self._residency.ranks())
        items = self._fill(plan, failed)
        if not items and self.running:  # who was planned does not fit beside those who pause
            plan = self._planner.plan(list(self.running), ranks=self._residency.ranks())
            items = self._fill(plan, failed)
        return Schedule(tuple(items), tuple(failed), self._planner.merged)

    def ran(self, schedule: Schedule, *, took_s: float) -> None:
        """The schedule was run, and took so long. Before its outputs are appended."""
        rows = [(item.ticket, item.start, item.end) for item in schedule.items]
        self._planner.ran(rows, ranks=self._residency.ranks(), took_s=took_s)

    def finish(self, ticket: Ticket) -> None:
        """The request ends, wherever it is: everything that it holds is free afterwards."""
        if ticket in self.waiting:
            self._leave_waiting(ticket)
        else:
            self._leave_running(ticket)
        self._planner.ended(ticket)
        ticket.request.state = RequestState.FINISHED

    def drop(self, key: AdapterKey) -> tuple[list[Failed], Future[None]]:
        """Forget an adapter: who waits for it fails, who runs with it finishes; the future is done when nothing is left of it."""
        failed = [self._fail(ticket, _dropped(key), True) for ticket in self.waiting if ticket.request.adapter == key]
        self.prefixes.forget(key)
        return failed, self._residency.drop(key)

    def computed(self, item: Scheduled, *, merged: bool) -> None:
        """The step has written K and V of the item; full blocks are shared from now on."""
        item.request.num_computed = item.end
        item.request.is_exact = item.request.is_exact and not merged
        self.prefixes.extend(item.request)

    # ---- running ----

    def _fill(self, plan: Plan, failed: list[Failed]) -> list[Scheduled]:
        items = self._continue_running(plan)
        return items + self._admit(plan, self.limits.max_step_tokens - sum(item.end - item.start for item in items), failed)

    def _continue_running(self, plan: Plan) -> list[Scheduled]:
        items = [Scheduled(ticket, ticket.request.num_computed, ticket.request.num_tokens) for ticket in self._decodable(plan)]
        budget = self.limits.max_step_tokens - len(items)
        for ticket in plan.batch:
            if ticket in self.running and not ticket.request.is_decoding and budget > 0:
                items.append(_chunk(ticket, budget))
                budget -= items[-1].end - items[-1].start
        return items

    def _decodable(self, plan: Plan) -> list[Ticket]:
        """Decoding requests that have a page for their next token, in order; taking it may preempt younger ones."""
        tickets = [ticket for ticket in plan.batch if ticket in self.running and ticket.request.is_decoding and self._grow(ticket)]
        return [ticket for ticket in tickets if ticket in self.running]

    def _grow(self, ticket: Ticket) -> bool:
        """Pages for all tokens of a running request. False if it had to be preempted itself."""
        missing = self._layout.pages_for(ticket.request.num_tokens) - len(ticket.request.pages)
        while missing > 0 and not self._residency.reclaimer.reclaim(missing):
            if self._planner.lend_merged():
                continue
            victim = self.running.youngest
            self._preempt(victim)
            if victim is ticket:
                return False
        if missing > 0:
            ticket.request.pages += self._pool.allocate(missing, owner=_owner(ticket.request))
        return True

    def _preempt(self, ticket: Ticket) -> None:
        assert len(self.running) > 1, f"{ticket.request.request_id} has the pool to itself and does not fit"
        self._leave_running(ticket)
        ticket.request.num_computed = 0
        ticket.request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(ticket)
        if ticket.request.adapter is not None:
            self._residency.want(ticket.request.adapter, grant=self._newest_grant(ticket.request.adapter))

    def _newest_grant(self, key: AdapterKey) -> str | None:
        """A preempted request's own may have expired."""
        return [one.grant for one in self.waiting if one.request.adapter == key][-1]

    def _leave_running(self, ticket: Ticket) -> None:
        self.running.remove(ticket)
        self.prefixes.release(ticket.request)
        if ticket.handle is not None:
            self._residency.release(ticket.handle)
        ticket.handle, ticket.request.slot = None, NO_SLOT

    # ---- waiting ----

    def _line_up(self, failed: list[Failed]) -> list[Ticket]:
        """Who could run. While the next in line does not fit, nobody is let in, so that all who are in move on."""
        line = self._planner.line_up(self.running, self._ready())
        while (first := next((ticket for ticket in line if ticket in self.waiting), None)) is not None:
            reason = self._impossible(first.request)
            if reason is None:
                fits = self._has_room(first.request, self._pages_to_admit(first.request))
                return line if fits or not self.running else [ticket for ticket in line if ticket in self.running]
            line.remove(first)
            failed.append(self._fail(first, reason, False))
        return line

    def _pages_to_admit(self, request: Request) -> int:
        return admission_pages(request, layout=self._layout) + headroom_pages(len(self.running))

    def _ready(self) -> list[Ticket]:
        """Waiting requests whose adapter is here; for the others it is seen to."""
        ready = []
        for position, ticket in enumerate(self.waiting):
            if self._is_ready(ticket):
                ready.append(ticket)
            elif position < self.limits.max_batch_requests:
                self._fetch(ticket, urgent=position == 0)
        return ready

    def _is_ready(self, ticket: Ticket) -> bool:
        return ticket.request.adapter is None or self._residency.is_ready(ticket.request.adapter)

    def _fetch(self, ticket: Ticket, *, urgent: bool) -> None:
        assert ticket.request.adapter is not None, "the base model is always here"
        self._residency.ensure(ticket.request.adapter, grant=ticket.grant, urgent=urgent)

    def _admit(self, plan: Plan, budget: int, failed: list[Failed]) -> list[Scheduled]:
        items: list[Scheduled] = []
        for ticket in plan.batch:
            if ticket not in self.waiting:
                continue
            if budget <= 0:
                break
            if not self._is_ready(ticket):  # it left the pool for a merged copy, or for one let in before it
                self._fetch(ticket, urgent=False)
                continue
            if (reason := self._impossible(ticket.request)) is not None:
                failed.append(self._fail(ticket, reason, False))
                continue
            if not self._take_places(ticket):
                break
            items.append(_chunk(ticket, budget))
            budget -= items[-1].end - items[-1].start
        return items

    def _impossible(self, request: Request) -> str | None:
        """An adapter's size is known only when it is here."""
        try:
            self.require_possible(request)
        except ValueError as error:
            return str(error)
        return None

    def _take_places(self, ticket: Ticket) -> bool:
        """Move a ready request to the running ones with its handle and pages, if there is room."""
        request = ticket.request
        self.prefixes.attach(request)  # first: what it shares is not idle then
        num_pages = admission_pages(request, layout=self._layout) - len(request.pages)
        if not self._has_room(request, num_pages + headroom_pages(len(self.running))):
            self.prefixes.release(request)
            request.num_computed = 0
            return False
        self.prefixes.admitted(request)
        if request.adapter is not None:
            ticket.handle = self._residency.acquire(request.adapter)
            request.slot = ticket.handle.slot
        self._leave_waiting(ticket)  # only now: what nobody wants may leave the host tier
        enough = self._residency.reclaimer.reclaim(num_pages)
        assert enough, f"admitted {request.request_id} without room for {num_pages} pages"
        request.pages += self._pool.allocate(num_pages, owner=_owner(request))
        self.running.add(ticket)
        return True

    def _has_room(self, request: Request, num_pages: int) -> bool:
        if request.adapter is not None:
            return self._residency.can_acquire(request.adapter, num_kv_pages=num_pages)
        return num_pages <= self._pool.num_free + self._residency.reclaimer.num_idle_pages

    def _leave_waiting(self, ticket: Ticket) -> None:
        self.waiting.remove(ticket)
        if ticket.request.adapter is not None:
            self._residency.unwant(ticket.request.adapter)

    def _fail_pulls(self) -> Iterable[Failed]:
        for failure in self._residency.poll():
            for ticket in self.waiting:
                if ticket.request.adapter == failure.key:
                    yield self._fail(ticket, failure.reason, failure.retryable)

    def _expire(self, now_s: float) -> Iterable[Failed]:
        """Who waits for a first token that cannot come in time any more, and who has waited for longer than it may."""
        waiting = list(self.waiting)
        if all(ticket.request.deadline_s is None for ticket in waiting):
            return
        forecast = Forecast(self._planner.cost, self.limits.max_batch_requests, self.limits.max_step_tokens)
        num_free = max(0, self.limits.max_batch_requests - len(self.running))
        late = forecast.hopeless(self._planner.line_up((), waiting), num_free=num_free, now_s=now_s)
        retry_after_s = forecast.retry_after_s(waiting, arrivals_per_s=self._arrivals.per_s(now_s)) if late else 1
        for ticket in late:
            yield self._fail(ticket, _late(ticket.request, now_s), True, retry_after_s=retry_after_s)

    def _fail(self, ticket: Ticket, reason: str, retryable: bool, *, retry_after_s: int = 1) -> Failed:
        self.finish(ticket)
        return Failed(ticket.request, reason, retryable, retry_after_s)

    def moved(self, pages: Mapping[int, int]) -> None:
        """Pages were copied, old -> new: block tables follow."""
        self.prefixes.moved(pages)
        for ticket in self.running:
            ticket.request.pages = [pages.get(page, page) for page in ticket.request.pages]

    @property
    def num_unused_bytes(self) -> int:
        """Of pages held for requests: room for tokens yet to come."""
        requests = [ticket.request for ticket in self.running]
        room = sum(len(request.pages) * self._layout.tokens_per_page - request.num_computed for request in requests)
        return room * self._layout.token_bytes

    def check_integrity(self) -> None:
        """Queues, KV pages and handles agree with pool and residency."""
        self.waiting.check_integrity()
        self.running.check_integrity()
        self._planner.fair.check_integrity()
        for ticket in self.waiting:
            assert not ticket.request.pages, f"{ticket.request.request_id} waits with pages"
            assert ticket.handle is None, f"{ticket.request.request_id} waits with a handle"
        for ticket in self.running:
            request = ticket.request
            own = request.pages[self.prefixes.num_shared(request) :]
            assert all(self._pool.owner_of(page) == _owner(request) for page in own), f"{request.request_id} lost a page"
            assert len(request.pages) >= self._layout.pages_for(request.num_computed), f"{request.request_id} computed beyond its pages"
            assert (ticket.handle is None) == (request.adapter is None), f"{request.request_id} runs without its handle"
        pages = [page for one in self.running for page in one.request.pages[self.prefixes.num_shared(one.request) :]]
        owned = sum(count for owner, count in self._pool.pages_by_owner().items() if owner.startswith(OWNER_PREFIX))
        assert len(set(pages)) == len(pages) == owned, f"requests own {owned} pages of the pool, {len(pages)} are known"
        self.prefixes.check_integrity()
        self._residency.check_integrity()
        self._pool.check_integrity()


OWNER_PREFIX = "kv:"


def _owner(request: Request) -> str:
    return f"{OWNER_PREFIX}{request.request_id}"


def _chunk(ticket: Ticket, budget: int) -> Scheduled:
    start = ticket.request.num_computed
    return Scheduled(ticket, start, min(start + budget, ticket.request.num_tokens))


def _dropped(key: AdapterKey) -> str:
    return f"the adapter of form {key.form_digest} was withdrawn while the request was queued"


def _late(request: Request, now_s: float) -> str:
    if request.deadline_s is not None and now_s > request.deadline_s:
        return "the deadline passed while the request was queued"
    return "the first token cannot come before the deadline: too much is queued ahead; try again later, or allow more time"
