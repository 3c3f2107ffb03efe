"""What every engine is asked to do, and how a driver reports it. Drivers run as processes and print JSON lines.

Imports nothing of Lorary, so that a peer's own environment can run its driver.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """`requests` greedy completions of exactly `tokens` tokens, `concurrent` at a time, over `distinct` adapters (0 = base)."""

    model: Path
    adapters: Path
    distinct: int
    requests: int
    tokens: int
    concurrent: int
    repetitions: int

    def prompts(self) -> list[str]:
        return [f"Write a story about number {i}. Once upon a time there was" for i in range(self.requests)]

    def adapter_dirs(self) -> list[Path]:
        return sorted(path for path in self.adapters.iterdir() if path.is_dir())[: self.distinct] if self.distinct else []


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--adapters", type=Path, required=True)
    made.add_argument("--distinct", type=int, default=0)
    made.add_argument("--requests", type=int, default=32)
    made.add_argument("--tokens", type=int, default=32)
    made.add_argument("--concurrent", type=int, default=16)
    made.add_argument("--repetitions", type=int, default=2)
    return made


def work_from(args: argparse.Namespace) -> Work:
    return Work(
        model=args.model,
        adapters=args.adapters,
        distinct=args.distinct,
        requests=args.requests,
        tokens=args.tokens,
        concurrent=args.concurrent,
        repetitions=args.repetitions,
    )


def report(peer: str, work: Work, generate: Callable[[], int]) -> None:
    """One warm-up of the same work, then one JSON line a repetition. `generate` returns the tokens that it made."""
    generate()
    for repetition in range(work.repetitions):
        started = time.perf_counter()
        made = generate()
        seconds = time.perf_counter() - started
        if made != work.requests * work.tokens:
            raise SystemExit(f"{peer} made {made} tokens, {work.requests * work.tokens} were asked for")
        line = {"peer": peer, "distinct": work.distinct, "repetition": repetition, "seconds": round(seconds, 3)}
        print(json.dumps(line | {"tokens_per_s": round(made / seconds, 2)}), flush=True)
