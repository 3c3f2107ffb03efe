"""The scheduling rows of `make bench-serving`: policies over S-LoRA's merge grid and dLoRA's strides, in virtual time.

Usage: python -m tests.bench.policy_replay [--short] [--table tests/bench/step_table.json]

The real scheduler runs on the measured table of `step_table.py` (and on dLoRA's published constants, 15 / 27 / 20 ms). The dynamic
policy obeys `max_wait_s`; of the static ones, unmerged is first come, first served, and merged passes over whom it likes. A cell is
replayed twice: at twice what unmerged mode serves, for throughput (prompt and output tokens a second, until the last is served), and
at S-LoRA's own overload of 1.4 with a deadline of 6 s for the first token.

Oracle: a beam search over the future that no policy sees. In each window it copies the replica and tries unmerged mode, merging
each of the two adapters with the most requests, and what the dynamic policy would do; it keeps the best few copies by work done
(or first tokens in time). Its result is the best of its beam and of the three policies: a lower bound of the optimum.
Mixed cells, for dLoRA's constants: its four strides, where neither static mode is best by itself; judged as in its figure 10, by
mean latency.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpu_runtime.config import POLICIES
from gpu_runtime.core import AdapterKey
from gpu_runtime.scheduling.mode import UNMERGED, Dynamic, Mode, View, merged_mode
from gpu_runtime.scheduling.planner import Rules
from tests.bench.replay_world import DloraMachine, Machine, MeasuredMachine, World, longest_over
from tests.bench.rows import Row, finish
from tests.bench.step_table import PATH
from tests.bench.workload import Arrival, DloraTrace, SloraTrace

COMMAND = "python -m tests.bench.policy_replay"
SLO_S, MAX_WAIT_S = 6.0, 10.0
STRIDES = (4, 8, 16, 32)
GRID = [(num, alpha) for num in (1, 2, 5) for alpha in (0.1, 0.3, 0.6, 1.0)]
MEAN_TOKENS = 2 * 259.5  # of S-LoRA's lengths

Score = Callable[[World], float]


@dataclass
class Scripted(Dynamic):
    """Does as told, where that is possible: an adapter to merge, None for unmerged, or "dynamic"."""

    wish: AdapterKey | str | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def choose(self, view: View) -> Iterator[Mode]:
        if self.wish == "dynamic":
            yield from super().choose(view)
            return
        if isinstance(self.wish, AdapterKey) and any(one.adapter == self.wish for one in view.queue):
            yield merged_mode(self.wish)
        yield UNMERGED


@dataclass(frozen=True)
class Cell:
    """A trace at two loads."""

    name: str
    saturated: Sequence[Arrival]
    overload: Sequence[Arrival]


@dataclass(frozen=True)
class Outcome:
    """Of each policy, and of the oracle, in a cell."""

    by_policy: dict[str, float] = field(default_factory=dict)
    oracle: float = 0.0

    @property
    def better_static(self) -> float:
        return max(self.by_policy["fcfs-unmerged"], self.by_policy["merged"])

    @property
    def over_static(self) -> float:
        return self.by_policy["dynamic"] / self.better_static if self.better_static else 1.0

    @property
    def over_oracle(self) -> float:
        return self.by_policy["dynamic"] / self.oracle if self.oracle else 1.0


def cells(machine: Machine, *, short: bool) -> list[Cell]:
    """S-LoRA's grid and dLoRA's strides, scaled to what this machine serves in unmerged mode."""
    served = _served(machine)
    duration_s = 40.0 if short else 120.0
    grid = GRID[3::4] + GRID[:1] if short else GRID
    made = [_scaled(f"S-LoRA n={num} alpha={alpha:g}", SloraTrace(num, alpha, duration_s=duration_s), served) for num, alpha in grid]
    strides = STRIDES[::3] if short else STRIDES
    return made + [_scaled(f"dLoRA stride={stride}", DloraTrace(stride, duration_s=duration_s), served) for stride in strides]


def _scaled(name: str, trace: SloraTrace | DloraTrace, served: float) -> Cell:
    return Cell(name, replace(trace, rate=2.0 * served).arrivals(), replace(trace, rate=1.4 * served).arrivals())


def _served(machine: Machine) -> float:
    """Requests of S-LoRA's lengths a second with every place taken, unmerged, five adapters."""
    arrivals = SloraTrace(5, 1.0, rate=50.0, duration_s=2.0).arrivals()
    return World(arrivals, machine, Rules()).run().tokens_per_s / MEAN_TOKENS


def world(arrivals: Sequence[Arrival], machine: Machine, policy: str, *, deadline_s: float | None = None) -> World:
    return World(arrivals, machine, Rules(policy, MAX_WAIT_S), deadline_s=deadline_s)


def outcome(
    arrivals: Sequence[Arrival], machine: Machine, score: Score, progress: Score, *, deadline_s: float | None, beam: int
) -> Outcome:
    """`score` of a finished replay; `progress` ranks the beam's unfinished ones."""
    by_policy = {name: score(world(arrivals, machine, name, deadline_s=deadline_s).run()) for name in POLICIES}
    found = search(arrivals, machine, score, progress, deadline_s=deadline_s, beam=beam)
    return Outcome(by_policy, max(found, *by_policy.values()))


def search(
    arrivals: Sequence[Arrival],
    machine: Machine,
    score: Score,
    progress: Score,
    *,
    deadline_s: float | None,
    beam: int,
    window_s: float = 5.0,
) -> float:
    """The best score that the beam ends with."""
    states = [World(arrivals, machine, Rules("dynamic", MAX_WAIT_S), chosen_by=Scripted(), deadline_s=deadline_s)]
    ended: list[World] = []
    until_s = 0.0
    while states:
        until_s += window_s
        grown = [branch.run(until_s=until_s) for state in states for branch in _branches(state)]
        ended += [one for one in grown if one.is_done]
        states = sorted((one for one in grown if not one.is_done), key=progress, reverse=True)[:beam]
    return max(map(score, ended))


def _branches(state: World) -> Iterator[World]:
    waiting = Counter(one.request.adapter for one in (*state.scheduler.running, *state.scheduler.waiting) if one.request.adapter)
    for wish in (None, "dynamic", *(key for key, _ in waiting.most_common(2))):
        branch = copy.deepcopy(state, {id(state.arrivals): state.arrivals, id(state.machine): state.machine})
        assert isinstance(branch.chosen_by, Scripted), "the oracle moves scripted worlds"
        branch.chosen_by.wish = wish
        yield branch


def _tokens_per_s(one: World) -> float:
    return one.tokens_per_s


def _work_done(one: World) -> float:
    """Tokens computed, a second: what is begun counts."""
    under_way = sum(ticket.request.num_computed for ticket in one.scheduler.running)
    return (one.tokens_per_s * one.now_s + under_way) / max(one.now_s, 1e-9)


def _attained(one: World) -> float:
    return one.attainment(SLO_S)


def _attained_and_work(one: World) -> float:
    return one.attainment(SLO_S) + 1e-6 * _work_done(one)


def rows(*, short: bool, table: Path = PATH) -> list[Row]:
    """The issue's rows; a line for every cell is printed on the way."""
    machine = MeasuredMachine(table)
    beam = 1 if short else 3
    kinds: tuple[tuple[str, Score, Score, float | None], ...] = (
        ("throughput", _tokens_per_s, _work_done, None),
        ("attainment", _attained, _attained_and_work, SLO_S),
    )
    worst: list[Row] = []
    outcomes: dict[str, list[tuple[str, Outcome]]] = {kind: [] for kind, *_ in kinds}
    for cell in cells(machine, short=short):
        for kind, score, progress, deadline_s in kinds:
            arrivals = cell.saturated if kind == "throughput" else cell.overload
            one = outcome(arrivals, machine, score, progress, deadline_s=deadline_s, beam=beam)
            outcomes[kind].append((cell.name, one))
            print(_line(cell.name, kind, one), flush=True)
    for kind, found in outcomes.items():
        worst.append(_worst(f"dynamic / better static mode, {kind}, worst cell", found, lambda one: one.over_static, bar=0.97))
        worst.append(_worst(f"dynamic / offline oracle, {kind}, worst cell", found, lambda one: one.over_oracle, bar=0.95))
    return [*worst, dlora_row(), wait_row(machine)]


def _worst(name: str, found: list[tuple[str, Outcome]], ratio: Callable[[Outcome], float], *, bar: float) -> Row:
    cell, one = min(found, key=lambda pair: ratio(pair[1]))
    short_of = sum(ratio(other) < bar for _, other in found)
    return Row(name, ratio(one), bar, COMMAND, detail=f"{cell}; {len(found) - short_of} of {len(found)} cells hold")


def _line(cell: str, kind: str, one: Outcome) -> str:
    shown = "  ".join(f"{name} {value:.3g}" for name, value in one.by_policy.items())
    return f"{cell:<24} {kind:<11} {shown}  oracle {one.oracle:.3g}  dynamic / better {one.over_static:.3f}, / oracle {one.over_oracle:.3f}"


def dlora_row() -> Row:
    """Mean latency at its figure 10's load: 400 requests, 4 a second, 8 adapters; the worst stride."""
    machine, ratios = DloraMachine(), {}
    for stride in STRIDES:
        arrivals = DloraTrace(stride, output_lengths=(8, 80)).arrivals()
        latency = {name: world(arrivals, machine, name).run().mean_latency_s for name in POLICIES}
        ratios[stride] = min(latency["fcfs-unmerged"], latency["merged"]) / latency["dynamic"]
        shown = "  ".join(f"{name} {value:.3f} s" for name, value in latency.items())
        print(f"{f'dLoRA stride={stride}':<24} its constants, mean latency  {shown}  better / dynamic {ratios[stride]:.3f}", flush=True)
    worst = min(ratios, key=ratios.__getitem__)
    return Row("dynamic / better static, dLoRA's constants, mixed cells", ratios[worst], 1.1, COMMAND, detail=f"latency; stride {worst}")


def wait_row(machine: Machine) -> Row:
    """A flood that makes one adapter's merging pay all the time, and others now and then."""
    flood = [Arrival(0.15 * at, 0, 8, 24) for at in range(1200)]
    others = [Arrival(1.0 + 3.7 * at, 1 + at % 4, 64, 24) for at in range(45)]
    arrivals = sorted(flood + others, key=lambda one: one.at_s)
    dynamic, fcfs = (world(arrivals, machine, name).run() for name in ("dynamic", "fcfs-unmerged"))
    detail = f"{len(arrivals)} requests, {dynamic.planner.num_switches} changes of mode; bound max_wait_s"
    return Row(
        "longest wait over FCFS, adversarial trace", longest_over(dynamic, fcfs), MAX_WAIT_S, COMMAND, at_most=True, unit="s", detail=detail
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer cells, shorter traces, a narrower beam")
    parser.add_argument("--table", type=Path, default=PATH)
    arguments = parser.parse_args()
    finish(rows(short=arguments.short, table=arguments.table))


if __name__ == "__main__":
    main()
