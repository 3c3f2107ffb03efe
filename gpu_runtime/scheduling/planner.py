"""Who runs in the next step, and in which mode: fair order, policy, credits and the cost model put together. Pure.

Whom the engine has begun with comes first, and who was passed over, in order of arrival; then who waits, in fair order. The
policy names modes; the first that passes nobody over for too long is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpu_runtime.core import AdapterKey
from gpu_runtime.scheduling.cost import LearntCost, StepCost, Work
from gpu_runtime.scheduling.credit import Credits
from gpu_runtime.scheduling.fair import FairShare
from gpu_runtime.scheduling.merger import Merger
from gpu_runtime.scheduling.mode import UNMERGED, Candidate, Mode, Policy, View, policy, predicted, unmerged_batch
from gpu_runtime.scheduling.queues import Ticket


@dataclass(frozen=True)
class Rules:
    """Settings of scheduling. `max_wait_s`: how long anybody is passed over beyond first come, first served. `max_adapters`: 0, any."""

    policy: str = "fcfs-unmerged"
    max_wait_s: float = 10.0
    max_adapters: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """`batch` runs, in this order, as far as tokens and pages last. `in_order`: it is what first come, first served would run."""

    queue: Sequence[Ticket]
    batch: Sequence[Ticket]
    merged: AdapterKey | None
    in_order: bool
    step_s: float = 0.0  # predicted, where it is not in order
    slower: float = 0.0  # share of the step's time that FCFS would not need for the same work


class Planner:
    """`cost` learns from `ran`; a fixed table may stand in its place. Without a `merger` every step is unmerged."""

    def __init__(
        self,
        rules: Rules,
        *,
        num_places: int,
        max_step_tokens: int,
        cost: StepCost | None = None,
        merger: Merger | None = None,
        chosen_by: Policy | None = None,
        fair: FairShare | None = None,
    ) -> None:
        self.rules = rules
        self.cost: StepCost = LearntCost() if cost is None else cost
        self.credits: Credits[Ticket] = Credits(rules.max_wait_s)
        self.fair = FairShare() if fair is None else fair
        self.merger = merger
        self.num_switches = 0
        self._policy = policy(rules.policy) if chosen_by is None else chosen_by
        self._num_places = num_places
        self._max_step_tokens = max_step_tokens
        self._is_fcfs = (rules.policy == "fcfs-unmerged" and chosen_by is None) or merger is None
        self._plan: Plan | None = None
        self._switch_s = 0.0

    @property
    def merged(self) -> AdapterKey | None:
        return None if self.merger is None else self.merger.merged

    def line_up(self, running: Iterable[Ticket], waiting: Iterable[Ticket]) -> list[Ticket]:
        """All who could run, in order of service."""
        fresh: list[Ticket] = []
        begun = list(running)
        for ticket in waiting:
            (begun if self.credits.of(ticket) > 0 else fresh).append(ticket)
        return sorted(begun, key=lambda ticket: ticket.order) + self.fair.order(fresh)

    def plan(self, queue: Sequence[Ticket], *, ranks: Mapping[AdapterKey, int]) -> Plan:
        """The next step. Weights are switched before it returns, so that pages are handed out after the merged copy has its own."""
        if not queue or (self._is_fcfs and not self.rules.max_adapters):
            plan = Plan(queue, queue[: self._num_places], None, in_order=True)
        else:
            plan = self._choose(queue, ranks)
        self._switch(plan.merged)
        self._plan = plan
        return plan

    def lend_merged(self) -> bool:
        """Pages are short: the step runs unmerged after all, and the merged copy may leave. False where nothing is merged."""
        if self.merger is None or self.merger.merged is None:
            return False
        self._switch(None)
        return True

    def ran(self, rows: Sequence[tuple[Ticket, int, int]], *, ranks: Mapping[AdapterKey, int], took_s: float) -> None:
        """The planned step computed tokens [start, end) of these, and took so long."""
        plan, self._plan = self._plan, None
        for ticket, start, end in rows:
            self.fair.served(ticket.request, start=start, end=end)
        if plan is not None and not plan.in_order:
            batch = {ticket for ticket, _, _ in rows}
            lost_s = took_s + self._switch_s
            self.credits.settle(plan.queue, batch, took_s=lost_s, slower_s=plan.slower * lost_s, num_places=self._num_places)
        self._switch_s = 0.0
        if isinstance(self.cost, LearntCost) and rows:
            self.cost.observe(Work.of([_row(*row, ranks) for row in rows], merged=self.merged is not None), took_s=took_s)

    def ended(self, ticket: Ticket) -> None:
        self.credits.forget(ticket)
        self.fair.leave(ticket.request)

    # ---- inside ----

    def _choose(self, queue: Sequence[Ticket], ranks: Mapping[AdapterKey, int]) -> Plan:
        candidates = {ticket: self._candidate(ticket, ranks) for ticket in queue}
        view = self._view(candidates)
        plan, mode = None, UNMERGED
        for mode in [UNMERGED] if self._is_fcfs else self._policy.choose(view):
            plan = self._plan_in(mode, candidates, view)
            if plan.in_order or not self._owed(plan, view):
                return plan
        assert plan is not None, "a policy names at least one mode"
        return self._strictly(plan) if mode == UNMERGED else plan

    def _plan_in(self, mode: Mode, candidates: Mapping[Ticket, Candidate], view: View) -> Plan:
        queue = list(candidates)
        batch = self._take(queue, mode=mode)
        in_order = batch == queue[: len(batch)] and len(batch) == min(self._num_places, len(queue))
        if in_order:
            return Plan(queue, batch, mode.merged, in_order=True)
        ours = predicted(view, [candidates[ticket] for ticket in batch], merged=mode.merged is not None)
        slower = max(0.0, 1.0 - ours.rate / unmerged_batch(view).rate)
        return Plan(queue, batch, mode.merged, in_order=False, step_s=ours.step_s, slower=slower)

    def _take(self, queue: Sequence[Ticket], *, mode: Mode) -> list[Ticket]:
        """The first who may run together: of the mode, and of at most `max_adapters` adapters."""
        batch: list[Ticket] = []
        adapters: set[AdapterKey] = set()
        for ticket in queue:
            if len(batch) >= self._num_places:
                break
            request = ticket.request
            if mode.allows(request.adapter, mergeable=not request.params.deterministic) and self._fits(request.adapter, adapters):
                batch.append(ticket)
        return batch

    def _fits(self, adapter: AdapterKey | None, adapters: set[AdapterKey]) -> bool:
        if adapter is not None and adapter not in adapters:
            if self.rules.max_adapters and len(adapters) >= self.rules.max_adapters:
                return False
            adapters.add(adapter)
        return True

    def _owed(self, plan: Plan, view: View) -> bool:
        """Whether this step, its change of mode and one more before anything can be done would pass somebody over for too long."""
        switch_s = view.cost.switch_s if plan.merged not in (None, view.merged) else 0.0
        return self.credits.owed(plan.queue, set(plan.batch), step_s=2 * plan.step_s + switch_s, num_places=self._num_places)

    def _strictly(self, plan: Plan) -> Plan:
        """Nobody before his turn: where a further adapter would be one too many, the batch ends."""
        end = next((at for at, ticket in enumerate(plan.batch) if ticket is not plan.queue[at]), len(plan.batch))
        return Plan(plan.queue, plan.batch[:end], None, in_order=True)

    def _view(self, candidates: Mapping[Ticket, Candidate]) -> View:
        return View(
            queue=list(candidates.values()),
            num_places=self._num_places,
            num_tokens=self._max_step_tokens,
            merged=self.merged,
            cost=self.cost,
            can_merge=_never if self.merger is None else self.merger.can_merge,
            max_wait_s=self.rules.max_wait_s,
        )

    def _candidate(self, ticket: Ticket, ranks: Mapping[AdapterKey, int]) -> Candidate:
        request = ticket.request
        return Candidate(
            request.adapter,
            num_tokens=request.num_uncomputed,
            rank=0 if request.adapter is None else ranks.get(request.adapter, 0),
            num_left=request.params.max_tokens - len(request.output_ids),
            mergeable=not request.params.deterministic,
            credit_s=self.credits.of(ticket),
        )

    def _switch(self, wanted: AdapterKey | None) -> None:
        merger = self.merger
        if merger is None or wanted == merger.merged:
            return
        was_merged, before_s = merger.merged is not None, merger.merge_s
        if wanted is None:
            merger.unmerge()
        else:
            merger.merge(wanted)
        self._switch_s = merger.merge_s - before_s
        self.num_switches += 1
        if wanted is not None and isinstance(self.cost, LearntCost):
            self.cost.observe_switch(self._switch_s)
        self._policy.changed(was_merged=was_merged, switch_s=self.cost.switch_s)


def _never(_: AdapterKey) -> bool:
    return False


def _row(ticket: Ticket, start: int, end: int, ranks: Mapping[AdapterKey, int]) -> tuple[int, AdapterKey | None, int]:
    adapter = ticket.request.adapter
    return end - start, adapter, 0 if adapter is None else ranks.get(adapter, 0)
