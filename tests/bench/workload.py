"""Request traces that serving papers measure with, made again by their rules, or read from a file. Imports nothing of Lorary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class DloraTrace:
    """dLoRA's mapping of serverless functions onto adapters (OSDI'24, section 7.1) over a bursty arrival process of our own.

    The Azure traces are not shipped, so functions are made: popularity falls as 1 / place, and in each interval a function's
    rate is drawn anew (lognormal, sigma `burstiness`), arrivals in it being gamma with coefficient of variation 1. Functions are
    sorted by popularity and dealt round robin, `stride` neighbours to an adapter at a time: a larger stride puts the popular
    ones together.
    """

    stride: int
    num_adapters: int = 8
    num_functions: int = 256
    rate: float = 4.0
    duration_s: float = 100.0
    interval_s: float = 10.0
    burstiness: float = 1.5
    lengths: tuple[int, int] = (8, 512)
    output_lengths: tuple[int, int] | None = None
    seed: int = 42

    def arrivals(self) -> list[Arrival]:
        random = np.random.RandomState(self.seed)
        popularity = 1.0 / np.arange(1, self.num_functions + 1)
        made: list[Arrival] = []
        for start_s in np.arange(0.0, self.duration_s, self.interval_s):
            rates = popularity * random.lognormal(0.0, self.burstiness, self.num_functions)
            times = random.exponential(1 / self.rate, int(self.rate * self.interval_s)).cumsum()  # gamma of cv 1
            times *= self.interval_s / max(self.interval_s, float(times[-1]))
            functions = random.choice(self.num_functions, len(times), p=rates / rates.sum())
            adapters = functions // self.stride % self.num_adapters
            prompts = random.randint(*self.lengths, len(times))
            outputs = random.randint(*(self.output_lengths or self.lengths), len(times))
            rows = zip((start_s + times).tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
            made += [Arrival(*row) for row in rows]
        return made


def save(path: Path, arrivals: Iterable[Arrival]) -> None:
    """One JSON object a line, in order of arrival."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in arrivals))


def load(path: Path) -> list[Arrival]:
    """What `save` wrote, or anybody's log in the same form. Raises ValueError naming the line that cannot be read."""
    made = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            made.append(Arrival(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no arrival: {error}; it needs at_s, adapter, num_prompt and num_output") from error
    return sorted(made, key=lambda one: one.at_s)
