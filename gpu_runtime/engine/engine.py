"""The engine: queues, pool and model behind `add_request`, `step`, `cancel`. One thread at a time (loop.py owns it)."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from gpu_runtime.adapters.merging import Merging
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.core import AdapterKey, FinishReason, Request, RequestState, StepOutput, TokenLogprob
from gpu_runtime.engine.inspection import activity
from gpu_runtime.engine.pool_map import pages_by_use, snapshot
from gpu_runtime.engine.runner import Runner
from gpu_runtime.engine.state import EngineCounts, EngineState, ResidentAdapter
from gpu_runtime.kernels.sample import Sampled
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.scheduling.queues import Queue, Ticket
from gpu_runtime.scheduling.scheduler import Failed, Schedule, Scheduled, Scheduler

Clock = Callable[[], float]


class Engine:
    """Serves requests from one base model and any adapters. `eos_token_ids` end a request unless it ignores them."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        residency: Residency,
        pool: PagePool,
        merging: Merging,
        max_rank: int,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        clock: Clock = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.residency = residency
        self.pool = pool
        self.merging = merging
        merging.follow(scheduler.moved)
        self._runner = runner
        self._max_rank = max_rank
        self._num_slots = num_slots
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._seeds = random.Random()  # noqa: S311 - seeds of sampling, not a secret
        self._ended: list[Failed] = []
        self._is_blocked = False
        self._num_step_tokens = 0
        self._num_generated_tokens = 0
        self._batch_sizes: Counter[int] = Counter()

    # ---- requests ----

    def check_request(self, request: Request) -> None:
        """Raises ValueError for a request that could never run here. Any thread."""
        outside = next((token for token in request.prompt_ids if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise ValueError(f"the prompt has token {outside}; the base model has tokens 0 to {self._vocab_size - 1}")
        self.scheduler.require_possible(request)

    def add_request(self, request: Request, *, grant: str | None = None) -> None:
        """Queue a request and start the pull of its adapter. Raises ValueError for one that could never run."""
        self.check_request(request)
        seed = request.params.seed
        self.scheduler.add(request, grant=grant, seed=self._seeds.getrandbits(63) if seed is None else seed)
        self._is_blocked = False

    def cancel(self, request_id: str) -> list[StepOutput]:
        """End a request in whatever state it is; its last output, or nothing if there is no such request."""
        ticket = self.scheduler.find(request_id)
        return [] if ticket is None else [self._end(ticket, FinishReason.CANCELLED)]

    def abort_all(self, reason: str, *, retryable: bool) -> list[StepOutput]:
        """End every request with an error."""
        tickets = [*self.scheduler.running, *self.scheduler.waiting]
        return [self._end(ticket, FinishReason.ERROR, error=reason, retryable=retryable) for ticket in tickets]

    def drop(self, key: AdapterKey) -> Future[None]:
        """Forget an adapter: who waits for it fails in the next step, who runs with it finishes, then its pages are zeroed."""
        self.merging.forget(key)
        failed, done = self.scheduler.drop(key)
        self._ended += failed
        self._is_blocked = False
        return done

    # ---- steps ----

    def step(self) -> list[StepOutput]:
        """Schedule, switch mode, run, emit."""
        schedule = self.scheduler.schedule(self._clock())
        self._ended += schedule.failed  # kept until they are told, even if the run fails
        self._enter(schedule)
        started_s = self._clock()
        sampled = self._runner.run(schedule.items, merged=schedule.merged)
        self.scheduler.ran(schedule, took_s=self._clock() - started_s)
        return self._emit(schedule, sampled)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._ended)

    @property
    def can_progress(self) -> bool:
        """Whether a step would do something. False while every request waits for a pull: `wake_with` tells when that changes."""
        return self.has_work and not self._is_blocked

    def wake_with(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from another thread, whenever a step has become worth taking."""
        self.residency.wake_with(wake)

    def close(self) -> None:
        """Begin no more pulls. Idempotent."""
        self.residency.close()

    # ---- state ----

    @property
    def max_requests(self) -> int:
        """Requests that may be in the engine at once, running and waiting."""
        return self.scheduler.limits.max_batch_requests + self.scheduler.limits.max_waiting

    def state(self) -> EngineState:
        """Snapshot between two steps."""
        return EngineState(
            condition="ready",
            num_queued=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_pages=self.pool.num_pages,
            num_free_pages=self.pool.num_free,
            page_bytes=self.pool.page_bytes,
            max_rank=self._max_rank,
            num_slots=self._num_slots,
            residents=self._residents(),
            pages=pages_by_use(self.pool, self.residency, self.scheduler.prefixes, self.merging),
            unused_bytes=self.residency.num_unused_bytes + self.scheduler.num_unused_bytes,
            running_adapters=_adapters(self.scheduler.running),
            waiting_adapters=_adapters(self.scheduler.waiting),
            counts=self._counts(),
        )

    def pool_map(self) -> dict[str, Any]:
        """What lies where in the pool, as plain values for people who look."""
        return snapshot(self.pool, self.residency, self.scheduler.prefixes, self.merging)

    def inspect(self) -> dict[str, Any]:
        """Everything an operator may look at, as JSON. On the step thread, between two steps."""
        return self.pool_map() | activity(self.scheduler, self.residency, num_slots=self._num_slots, now_s=self._clock())

    def check_integrity(self) -> None:
        """Every page, slot and handle has exactly one owner who knows of it."""
        self.scheduler.check_integrity()
        self.merging.check_integrity()

    def _residents(self) -> tuple[ResidentAdapter, ...]:
        pool, host, disk = self.residency.tiers()
        ranks = self.residency.ranks()
        tiers = {
            **{key: ResidentAdapter(key, "disk") for key in disk},
            **{key: ResidentAdapter(key, "host") for key in host},
            **{key: ResidentAdapter(key, "pool", ranks[key]) for key in pool},
        }
        return tuple(tiers.values())

    def _counts(self) -> EngineCounts:
        return EngineCounts(
            num_step_tokens=self._num_step_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            num_loads=self.residency.num_loads,
            load_s=self.residency.load_s,
            num_evictions=self.residency.num_evictions,
            num_prefix_queried_tokens=self.scheduler.prefixes.counts.num_queried_tokens,
            num_prefix_hit_tokens=self.scheduler.prefixes.counts.num_hit_tokens,
            num_prefix_evictions=self.scheduler.prefixes.counts.num_evicted_blocks,
            num_merges=self.merging.num_merges,
            merge_s=self.merging.merge_s,
            num_moved_pages=self.merging.num_moved_pages,
            batch_sizes=dict(self._batch_sizes),
            pulls=self.residency.pull_counts,
        )

    # ---- inside ----

    def _enter(self, schedule: Schedule) -> None:
        """The mode that the step was planned in."""
        if schedule.merged is not None:
            self.merging.merge(schedule.merged)
        else:
            self.merging.unmerge()

    def _emit(self, schedule: Schedule, sampled: list[tuple[Scheduled, Sampled]]) -> list[StepOutput]:
        for item in schedule.items:
            self.scheduler.computed(item, merged=schedule.merged is not None)
        self._count(schedule)
        failed, self._ended = self._ended, []
        self._is_blocked = not schedule.items and not failed
        return [*map(_failure, failed), *(self._advance(item.ticket, choice) for item, choice in sampled)]

    def _count(self, schedule: Schedule) -> None:
        if schedule.items:
            self._batch_sizes[len(schedule.items)] += 1
            self._num_step_tokens += sum(item.end - item.start for item in schedule.items)

    def _advance(self, ticket: Ticket, choice: Sampled) -> StepOutput:
        """Append the chosen token, or end a request whose logits are not numbers."""
        request = ticket.request
        if choice.token_id is None:
            return self._end(ticket, FinishReason.ERROR, error="the adapter made the model's logits NaN or infinite")
        request.output_ids.append(choice.token_id)
        self._num_generated_tokens += 1
        reason = self._finish_reason(request, choice.token_id)
        if reason is not None:
            self._end(ticket, reason)
        cached, scored = request.num_cached or 0, _scores(request)
        return StepOutput(
            request.request_id, choice.token_id, choice.logprob, finish_reason=reason, num_cached=cached, prompt_logprobs=scored
        )

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        ends = token_id in self._eos_token_ids and not request.params.ignore_eos
        if ends or token_id in request.params.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(request.output_ids) >= request.params.max_tokens else None

    def _end(self, ticket: Ticket, reason: FinishReason, *, error: str | None = None, retryable: bool = False) -> StepOutput:
        self.scheduler.finish(ticket)
        ticket.request.finish_reason = reason
        return StepOutput(ticket.request.request_id, None, finish_reason=reason, error=error, retryable=retryable)


def _scores(request: Request) -> tuple[TokenLogprob, ...] | None:
    """Of the prompt, with the first token."""
    wanted = request.params.prompt_logprobs is not None and len(request.output_ids) == 1
    return tuple(request.prompt_logprobs) if wanted else None


def _adapters(queue: Queue) -> frozenset[AdapterKey]:
    return frozenset(ticket.request.adapter for ticket in queue if ticket.request.adapter is not None)


def _failure(failed: Failed) -> StepOutput:
    assert failed.request.state is RequestState.FINISHED, f"{failed.request.request_id} failed but holds its place"
    failed.request.finish_reason = FinishReason.ERROR
    return StepOutput(
        failed.request.request_id,
        None,
        finish_reason=FinishReason.ERROR,
        error=failed.reason,
        retryable=failed.retryable,
        retry_after_s=failed.retry_after_s,
    )
