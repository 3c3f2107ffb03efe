"""Merged or unmerged, step by step: three policies behind one method. Pure: what they know is a `View`.

fcfs-unmerged   first come, first served, every adapter through the LoRA kernels
merged          always one adapter's merged weights; its requests alone run until none is left (base rows: base weights)
dynamic         dLoRA's Algorithm 1 (OSDI'24 section 5.1) on learnt times: whichever mode is predicted to do more a second
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpu_runtime.core import AdapterKey
from gpu_runtime.scheduling.cost import StepCost, Work
from gpu_runtime.scheduling.thresholds import Thresholds


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that could run in the next step: `num_tokens` of it would, `num_left` of its output are still to come at most.

    `mergeable`: it does not ask to be deterministic. `credit_s`: what it has been passed over so far (`credit.py`).
    """

    adapter: AdapterKey | None
    num_tokens: int
    rank: int
    num_left: int = 1
    mergeable: bool = True
    credit_s: float = 0.0


@dataclass(frozen=True)
class View:
    """What a policy decides by: candidates in their order of service, a step's places and tokens, and what it costs."""

    queue: Sequence[Candidate]
    num_places: int
    num_tokens: int
    merged: AdapterKey | None
    cost: StepCost
    can_merge: Callable[[AdapterKey], bool]
    max_wait_s: float


@dataclass(frozen=True)
class Mode:
    """`merged`: whose merged weights the step reads. `exclusive`: only requests of `only` run, those of the base model where it is None."""

    merged: AdapterKey | None = None
    exclusive: bool = False
    only: AdapterKey | None = None

    def allows(self, adapter: AdapterKey | None, *, mergeable: bool) -> bool:
        return (not self.exclusive or adapter == self.only) and (self.merged is None or mergeable)


UNMERGED = Mode()


def merged_mode(key: AdapterKey) -> Mode:
    return Mode(merged=key, exclusive=True, only=key)


class Policy(Protocol):
    """The modes that the next step could run in, best first. One that would pass somebody over for too long is left out.

    The last one never is.
    """

    def choose(self, view: View) -> Iterator[Mode]: ...

    def changed(self, *, was_merged: bool, switch_s: float) -> None:
        """The step that was chosen runs in another mode than the one before it, and the change took `switch_s`."""
        ...


class Unmerged:
    def choose(self, view: View) -> Iterator[Mode]:  # noqa: ARG002 - a policy's signature
        yield UNMERGED

    def changed(self, *, was_merged: bool, switch_s: float) -> None: ...


class AlwaysMerged:
    """Stays with an adapter while it has requests, then takes the oldest request's. Deterministic requests go by themselves."""

    def choose(self, view: View) -> Iterator[Mode]:
        here = view.merged
        if here is not None and any(one.adapter == here and one.mergeable for one in view.queue):
            yield merged_mode(here)
        oldest = view.queue[0]
        if oldest.adapter is None or not oldest.mergeable:
            yield Mode(exclusive=True, only=oldest.adapter)
        else:
            yield merged_mode(oldest.adapter) if oldest.adapter == here or view.can_merge(oldest.adapter) else UNMERGED

    def changed(self, *, was_merged: bool, switch_s: float) -> None: ...


@dataclass(frozen=True)
class Batch:
    """What a step would achieve. `value`: seconds that the base model alone, with every place taken, needs for as much."""

    value: float
    step_s: float

    @property
    def rate(self) -> float:
        return self.value / self.step_s


class Dynamic:
    """Stays merged on an adapter while that is at least `left` times as good as unmerged, and goes over to one that is at least
    `right` times as good, its change of mode paid for. A partly filled merged batch pays for its empty places by itself.

    Of several worth it, the one whose requests were passed over longest: they take turns of a share of `max_wait_s`, so
    that none of them comes to its bound, where the step must be first come, first served.
    """

    def __init__(self) -> None:
        self.thresholds = Thresholds()

    def choose(self, view: View) -> Iterator[Mode]:
        fcfs = unmerged_batch(view)
        worth, stay = self._worth(view, fcfs)
        yield from (merged_mode(key) for key in _in_turn(worth, view=view, stay=stay))
        yield UNMERGED

    def changed(self, *, was_merged: bool, switch_s: float) -> None:
        self.thresholds.end_phase(was_merged=was_merged, switch_s=switch_s)

    def _worth(self, view: View, fcfs: Batch) -> tuple[dict[AdapterKey, float], bool]:
        """Adapters worth merging, with the longest credit of each; whether the one that is merged is among them."""
        by_adapter = _mergeable(view)
        worth, best = {}, None
        for key, able in by_adapter.items():
            merged = merged_batch(view, able)
            best = merged if best is None or merged.rate > best.rate else best
            if self._pays(view, key, able, merged=merged, fcfs=fcfs):
                worth[key] = max(one.credit_s for one in able)
        if best is not None:
            self.thresholds.count(merged=(best.value, best.step_s), unmerged=(fcfs.value, fcfs.step_s))
        return worth, view.merged in worth

    def _pays(self, view: View, key: AdapterKey, able: Sequence[Candidate], *, merged: Batch, fcfs: Batch) -> bool:
        if key == view.merged:
            return merged.rate >= self.thresholds.left * fcfs.rate
        stretch_s = _stretch_s(view, able, step_s=merged.step_s)
        paid = stretch_s / (stretch_s + view.cost.switch_s)
        return merged.rate * paid >= self.thresholds.right * fcfs.rate and view.can_merge(key)


def _in_turn(worth: dict[AdapterKey, float], *, view: View, stay: bool) -> list[AdapterKey]:
    """By credit, longest first; the one that is merged keeps its turn until another's credit has reached a turn's length."""
    order = sorted(worth, key=lambda key: -worth[key])
    if stay and worth[order[0]] < view.max_wait_s / (len(order) + 1):
        order.sort(key=lambda key: key != view.merged)
    return order


def _mergeable(view: View) -> dict[AdapterKey, list[Candidate]]:
    """Those with enough requests to be worth a look: the five with the most, and the one that is merged."""
    counts = Counter(one.adapter for one in view.queue if one.adapter is not None and one.mergeable)
    keys = [key for key, _ in counts.most_common(5)]
    if view.merged is not None and counts[view.merged] and view.merged not in keys:
        keys.append(view.merged)
    return {key: [one for one in view.queue if one.adapter == key and one.mergeable] for key in keys}


def _stretch_s(view: View, able: Sequence[Candidate], *, step_s: float) -> float:
    """How long a merged phase can last: what the adapter's requests still need, and at most half of what others may wait."""
    places = min(len(able), view.num_places)
    steps = sum(one.num_left for one in able) / places
    return min(view.max_wait_s / 2, max(1.0, steps) * step_s)


def policy(name: str) -> Policy:
    """By its name in the configuration. Raises KeyError for another."""
    made: dict[str, Callable[[], Policy]] = {"fcfs-unmerged": Unmerged, "merged": AlwaysMerged, "dynamic": Dynamic}
    return made[name]()


def unmerged_batch(view: View) -> Batch:
    return predicted(view, view.queue[: view.num_places], merged=False)


def merged_batch(view: View, able: Sequence[Candidate]) -> Batch:
    return predicted(view, able[: view.num_places], merged=True)


def predicted(view: View, batch: Sequence[Candidate], *, merged: bool) -> Batch:
    """A request's share of a full base step, and each further token what it adds to one."""
    full_s, token_s = view.cost.full_step(view.num_places)
    value, left, taken = 0.0, view.num_tokens, []
    for one in batch:
        if left <= 0:
            break
        num_tokens = min(one.num_tokens, left)
        left -= num_tokens
        value += full_s / view.num_places + (num_tokens - 1) * token_s
        taken.append((num_tokens, one.adapter, one.rank))
    return Batch(value, max(view.cost.predict(Work.of(taken, merged=merged)), 1e-9))
