"""Request traces that serving papers measure with, made again by their rules. Imports nothing of Lorary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes (seconds from the start), for which adapter, and how long it is in tokens."""

    at_s: float
    adapter: int
    num_prompt: int
    num_output: int


@dataclass(frozen=True)
class SloraTrace:
    """S-LoRA's synthetic workload (arXiv 2311.03285, section 7.1; its benchmarks/trace.py), number for number for one seed.

    adapter   int(power(alpha) * num_adapters): alpha 1 is uniform, smaller is skewed to adapter 0
    arrivals  gamma intervals with mean 1 / rate and coefficient of variation cv; int(rate * duration_s) of them
    lengths   uniform over [low, high), prompt and output apart
    """

    num_adapters: int
    alpha: float = 1.0
    rate: float = 10.0
    cv: float = 1.0
    duration_s: float = 60.0
    lengths: tuple[int, int] = (8, 512)
    seed: int = 42

    def arrivals(self) -> list[Arrival]:
        random = np.random.RandomState(self.seed)
        count = int(self.rate * self.duration_s)
        adapters = (random.power(self.alpha, count) * self.num_adapters).astype(int)
        prompts = random.randint(*self.lengths, count)
        outputs = random.randint(*self.lengths, count)
        times = random.gamma(1 / self.cv**2, self.cv**2 / self.rate, count).cumsum()
        return [Arrival(*row) for row in zip(times.tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist(), strict=True)]
