"""How long a step takes, learnt while serving: what `mode.py` compares modes by. Pure: times come from outside.

A step costs  c0 + c1 * requests + c2 * tokens + c3 (with adapters) + c4 * adapters + c5 * ranks  seconds; ranks are summed over
the distinct adapters. In merged mode adapters and ranks are 0, for then the deltas lie in the weights: one model serves both modes, and
what is learnt in one tells about the other. dLoRA has constants in its place (OSDI'24, its scheduler.py: 15 and 27 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gpu_runtime.core import AdapterKey

FORGET = 0.995  # a step's weight after one more: about the last 200 steps count
PRIOR_WEIGHT = 1.0  # of the table that it starts from, in steps; forgotten like one
OUTLIER = 3.0  # times the usual miss beyond which a step counts for less: the machine did something else
SWITCH_FORGET = 0.8
SHORTEST_S = 1e-4  # shorter steps count as if they had taken so long
ANCHOR = 1e-3  # of the prior's weight, what holds a coefficient where it is while no step tells of it

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What a step computes. Merged mode: `num_adapters` and `rank_sum` are 0."""

    num_requests: int
    num_tokens: int
    num_adapters: int = 0
    rank_sum: int = 0

    @classmethod
    def of(cls, rows: Sequence[tuple[int, AdapterKey | None, int]], *, merged: bool) -> Work:
        """Of (tokens, adapter, rank) of each request."""
        ranks = {} if merged else {adapter: rank for _, adapter, rank in rows if adapter is not None}
        return cls(len(rows), sum(row[0] for row in rows), len(ranks), sum(ranks.values()))

    def features(self) -> Vector:
        return np.array([1.0, self.num_requests, self.num_tokens, min(1, self.num_adapters), self.num_adapters, self.rank_sum])


@dataclass(frozen=True)
class CostTable:
    """Seconds: where learning starts, and what a step costs where nothing is learnt (a replay)."""

    step_s: float
    request_s: float
    token_s: float
    lora_s: float  # once, where any row has an adapter
    adapter_s: float
    rank_s: float
    switch_s: float

    def coefficients(self) -> Vector:
        return np.array([self.step_s, self.request_s, self.token_s, self.lora_s, self.adapter_s, self.rank_s])

    def predict(self, work: Work) -> float:
        tokens_s = self.request_s * work.num_requests + self.token_s * work.num_tokens
        lora_s = self.lora_s + self.adapter_s * work.num_adapters + self.rank_s * work.rank_sum if work.num_adapters else 0.0
        return self.step_s + tokens_s + lora_s

    def full_step(self, num_places: int) -> tuple[float, float]:
        return self.predict(Work(num_places, num_places)), self.token_s


class StepCost(Protocol):
    """Seconds of a step, and of a change of mode."""

    @property
    def switch_s(self) -> float: ...

    def predict(self, work: Work) -> float: ...

    def full_step(self, num_places: int) -> tuple[float, float]:
        """Of a base step with every place decoding, and of each further token in it."""
        ...


UNKNOWN = CostTable(step_s=20e-3, request_s=5e-4, token_s=5e-4, lora_s=5e-3, adapter_s=1e-3, rank_s=1e-5, switch_s=0.1)
"""Before anything was measured. The first steps replace what they tell of. Where every step has adapters they do not tell what
one without would take: then merged mode is tried for what this says it saves."""


class LearntCost:
    """Least squares of relative errors with forgetting, over non-negative coefficients; a step far off the rest counts for less."""

    def __init__(self, start: CostTable = UNKNOWN) -> None:
        self._table = start
        # the prior believes each coefficient apart from the others, in units of a typical step
        scale = np.array([1.0, 16.0, 64.0, 1.0, 16.0, 256.0])
        self._gram: npt.NDArray[np.float64] = np.diag(PRIOR_WEIGHT * scale**2 / start.step_s**2)
        self._anchor = ANCHOR * self._gram
        self._moment = self._gram @ start.coefficients()
        self._miss = 0.0  # usual distance between prediction and measurement, as a share
        self.num_observed = 0

    @property
    def switch_s(self) -> float:
        return self._table.switch_s

    def predict(self, work: Work) -> float:
        return self._table.predict(work)

    def full_step(self, num_places: int) -> tuple[float, float]:
        return self._table.full_step(num_places)

    @property
    def table(self) -> CostTable:
        """What is learnt so far."""
        return self._table

    def observe(self, work: Work, *, took_s: float) -> None:
        """A step of `work` took so long."""
        features = work.features()
        weight = self._weight(abs(took_s / max(self.predict(work), 1e-9) - 1.0)) / max(took_s, SHORTEST_S) ** 2
        self._gram = FORGET * self._gram + weight * np.outer(features, features)
        self._moment = FORGET * self._moment + weight * took_s * features
        held = self._moment + self._anchor @ self._table.coefficients()
        self._table = self._as_table(_non_negative(self._gram + self._anchor, held), switch_s=self.switch_s)
        self.num_observed += 1

    def observe_switch(self, took_s: float) -> None:
        switch_s = SWITCH_FORGET * self.switch_s + (1 - SWITCH_FORGET) * took_s
        self._table = self._as_table(self._table.coefficients(), switch_s=switch_s)

    @staticmethod
    def _as_table(coefficients: Vector, *, switch_s: float) -> CostTable:
        step_s, request_s, token_s, lora_s, adapter_s, rank_s = map(float, coefficients)
        return CostTable(step_s, request_s, token_s, lora_s, adapter_s, rank_s, switch_s)

    def _weight(self, miss: float) -> float:
        usual = self._miss
        self._miss = miss if self.num_observed == 0 else 0.95 * usual + 0.05 * min(miss, OUTLIER * usual + 1e-3)
        return 1.0 if self.num_observed < 8 or miss <= OUTLIER * usual else OUTLIER * usual / miss


def _non_negative(gram: npt.NDArray[np.float64], moment: Vector) -> Vector:
    """argmin of x G x / 2 - m x over x >= 0: drop the most negative coefficient until none is (six at most)."""
    free = np.ones(len(moment), dtype=bool)
    solution = np.zeros(len(moment))
    while free.any():
        part = np.linalg.solve(gram[np.ix_(free, free)], moment[free])
        if (part >= 0).all():
            solution[free] = part
            break
        free[np.flatnonzero(free)[int(part.argmin())]] = False
    return solution
