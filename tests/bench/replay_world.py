"""A replica in virtual time: the real scheduler and page pool, a clock that only steps move, and a table in the kernels' place.

Every adapter is resident. A world can be copied with `copy.deepcopy` and go on in two ways, which is how an oracle looks ahead.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from gpu_runtime.adapters.handle import Handle
from gpu_runtime.core import AdapterKey, Request, SamplingParams
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.scheduling.admission import Limits
from gpu_runtime.scheduling.mode import Policy
from gpu_runtime.scheduling.planner import Planner, Rules
from gpu_runtime.scheduling.queues import Ticket
from gpu_runtime.scheduling.scheduler import Schedule, Scheduler
from tests.bench.workload import Arrival

LAYOUT = PageLayout(num_layers=1, num_kv_heads=1, head_dim=4, tokens_per_page=16)
RANK = 16


class Machine(Protocol):
    """Seconds of a step, by the tokens of each request and how many distinct adapters its kernels meet, and of a merge."""

    merge_s: float

    def step_s(self, tokens: Sequence[int], num_adapters: int) -> float: ...


class MeasuredMachine:
    """`step_table.json`, read between its points: all tokens of a step, plus what the adapters add."""

    def __init__(self, path: Path) -> None:
        table = json.loads(path.read_text())
        self.merge_s = float(table["merge_s"])
        self._base, self._one, self._distinct = (_points(table[name]) for name in ("base_s", "one_s", "distinct_s"))

    def step_s(self, tokens: Sequence[int], num_adapters: int) -> float:
        total = sum(tokens)
        if not num_adapters:
            return _between(self._base, total)
        more = _between(self._distinct, num_adapters) - self._distinct[0][1]
        return max(_between(self._base, total), _between(self._one, total)) + max(0.0, more) * min(1.0, len(tokens) / 16)


@dataclass(frozen=True)
class DloraMachine:
    """dLoRA's published constants: a step takes 15 ms merged and 27 ms unmerged whatever is in it, a change of mode 20 ms."""

    merge_s: float = 0.020

    def step_s(self, tokens: Sequence[int], num_adapters: int) -> float:
        return 0.027 if num_adapters else 0.015


def _points(row: dict[str, float]) -> list[tuple[int, float]]:
    return sorted((int(size), float(seconds)) for size, seconds in row.items())


def _between(points: list[tuple[int, float]], at: float) -> float:
    """Linear between the points and along the last two beyond them."""
    index = min(max(1, bisect_left(points, (at, 0.0))), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


@dataclass
class VirtualMerger:
    """Takes the machine's time for a merge; going back is free, as it is in the engine."""

    cost_s: float
    merged: AdapterKey | None = None
    merge_s: float = 0.0

    def can_merge(self, key: AdapterKey) -> bool:
        return True

    def merge(self, key: AdapterKey) -> None:
        self.merge_s += self.cost_s
        self.merged = key

    def unmerge(self) -> None:
        self.merged = None


class AllResident:
    """The residency that a scheduler sees where every adapter has its slot."""

    def __init__(self, pool: PagePool, num_adapters: int) -> None:
        self._pool = pool
        self._slots = {adapter(at): at for at in range(num_adapters)}
        self.reclaimer = SimpleNamespace(num_idle_pages=0, reclaim=self._has, add=self._lend)

    def ranks(self) -> dict[AdapterKey, int]:
        return dict.fromkeys(self._slots, RANK)

    def num_pages(self, key: AdapterKey) -> int:
        return 0

    def is_ready(self, key: AdapterKey) -> bool:
        return key in self._slots

    def can_acquire(self, key: AdapterKey, *, num_kv_pages: int) -> bool:
        return self._has(num_kv_pages)

    def acquire(self, key: AdapterKey) -> Handle:
        return Handle(SimpleNamespace(slot=self._slots[key]))  # type: ignore[arg-type] # all that a scheduler reads of it

    def release(self, handle: Handle) -> None: ...
    def want(self, key: AdapterKey, *, grant: str | None) -> None: ...
    def unwant(self, key: AdapterKey) -> None: ...
    def check_integrity(self) -> None: ...

    def poll(self) -> list[Any]:
        return []

    def _lend(self, lender: object) -> None: ...

    def _has(self, num_pages: int) -> bool:
        return num_pages <= self._pool.num_free


def adapter(index: int) -> AdapterKey:
    return AdapterKey("t", f"{index:064d}")


@dataclass
class Times:
    """What became of a request. Seconds of the world's clock."""

    arrived_s: float
    num_tokens: int
    first_s: float | None = None
    ended_s: float | None = None


@dataclass
class World:
    """`deadline_s` after its arrival each request's first token is due; None: whenever. Prompts and outputs of a trace as given."""

    arrivals: Sequence[Arrival]
    machine: Machine
    rules: Rules
    chosen_by: Policy | None = None
    deadline_s: float | None = None
    num_places: int = 16
    step_tokens: int = 512
    now_s: float = 0.0
    num_arrived: int = 0
    num_steps: int = 0
    most_adapters: int = 0  # in a step
    most_adapters: int = 0  # in a step
    times: dict[str, Times] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_adapters = max((one.adapter for one in self.arrivals), default=0) + 1
        pool = PagePool(num_pages=8192, page_bytes=LAYOUT.page_bytes)
        self.merger = VirtualMerger(self.machine.merge_s)
        self.planner = Planner(
            self.rules, num_places=self.num_places, max_step_tokens=self.step_tokens, merger=self.merger, chosen_by=self.chosen_by
        )
        limits = Limits(pool.num_pages, self.num_places, self.step_tokens, max_model_len=10**6, max_waiting=10**6)
        residency: Any = AllResident(pool, num_adapters)
        self.scheduler = Scheduler(limits=limits, layout=LAYOUT, pool=pool, residency=residency, planner=self.planner)

    def run(self, *, until_s: float = float("inf")) -> World:
        """Step until then, or until everything has ended."""
        while self.now_s < until_s and self._arrive():
            self._step()
        return self

    @property
    def is_done(self) -> bool:
        return self.num_arrived == len(self.arrivals) and not (self.scheduler.running or self.scheduler.waiting)

    def _arrive(self) -> bool:
        """Let in who has come by now; where nothing is to be done, wait for the next one. False when all is over."""
        if not (self.scheduler.running or self.scheduler.waiting):
            if self.num_arrived == len(self.arrivals):
                return False
            self.now_s = max(self.now_s, self.arrivals[self.num_arrived].at_s)
        while self.num_arrived < len(self.arrivals) and self.arrivals[self.num_arrived].at_s <= self.now_s:
            self._add(self.arrivals[self.num_arrived])
            self.num_arrived += 1
        return True

    def _add(self, one: Arrival) -> None:
        name = f"r{self.num_arrived}"
        due_s = None if self.deadline_s is None else one.at_s + self.deadline_s
        params = SamplingParams(max_tokens=one.num_output, temperature=0.0)
        key = None if one.adapter < 0 else adapter(one.adapter)
        request = Request(name, (1,) * one.num_prompt, params, key, arrived_s=one.at_s, deadline_s=due_s)
        self.times[name] = Times(one.at_s, one.num_prompt + one.num_output)
        self.scheduler.add(request, grant=None, seed=0)

    def _step(self) -> None:
        before_s = self.merger.merge_s
        schedule = self.scheduler.schedule(self.now_s)
        self.now_s += self.merger.merge_s - before_s
        took_s = self._seconds(schedule)
        self.scheduler.ran(schedule, took_s=took_s)
        self.now_s += took_s
        self.num_steps += 1
        for item in schedule.items:
            samples = item.samples
            self.scheduler.computed(item, merged=schedule.merged is not None)
            if samples:
                self._sampled(item.ticket)

    def _seconds(self, schedule: Schedule) -> float:
        if not schedule.items:
            return 0.0
        adapters = {item.request.adapter for item in schedule.items if item.request.adapter is not None}
        self.most_adapters = max(self.most_adapters, len(adapters))
        self.most_adapters = max(self.most_adapters, len(adapters))
        tokens = [item.end - item.start for item in schedule.items]
        return self.machine.step_s(tokens, 0 if schedule.merged is not None else len(adapters))

    def _sampled(self, ticket: Ticket) -> None:
        request, times = ticket.request, self.times[ticket.request.request_id]
        request.output_ids.append(7)
        if times.first_s is None:
            times.first_s = self.now_s
        if len(request.output_ids) == request.params.max_tokens:
            times.ended_s = self.now_s
            self.scheduler.finish(ticket)

    # ---- what came of it ----

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output tokens of what was served to the end, over all of the time."""
        return sum(one.num_tokens for one in self.times.values() if one.ended_s is not None) / self.now_s

    @property
    def mean_latency_s(self) -> float:
        ended = [one.ended_s - one.arrived_s for one in self.times.values() if one.ended_s is not None]
        return sum(ended) / len(ended)

    def attainment(self, slo_s: float) -> float:
        """Share of all requests whose first token came within `slo_s`."""
        met = [one for one in self.times.values() if one.first_s is not None and one.first_s - one.arrived_s <= slo_s]
        return len(met) / len(self.arrivals)


def longest_over(world: World, fcfs: World) -> float:
    """The most that any request's first token came later than where all is first come, first served. Seconds."""
    pairs = ((world.times[name].first_s, one.first_s) for name, one in fcfs.times.items())
    return max(ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None)
