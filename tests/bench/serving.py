"""`make bench-serving`: every bar of the runtime in one run, as ratios; 1 while a row falls short, 2 where one could not be measured.

A part is a module with `rows(*, short) -> list[Row]`; BENCH_ARGS="--short" does less work and says so in the rows, and
BENCH_ARGS="--only throughput,eviction" measures these parts alone. Results go to <cache>/bench-serving.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench import eviction, many_adapters, policy_replay, throughput, unified
from tests.bench.rows import Row, show, status, write


def parts(cache: Path) -> dict[str, Callable[..., list[Row]]]:
    return {
        "throughput": partial(throughput.rows, cache=cache),
        "many_adapters": many_adapters.rows,
        "eviction": eviction.rows,
        "unified": unified.rows,
        "scheduling": policy_replay.rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--short", action="store_true", help="less work a row")
    parser.add_argument("--only", default="", help="names of parts, with commas between them")
    options = parser.parse_args()
    known = parts(options.cache.resolve())
    chosen = options.only.split(",") if options.only else list(known)
    unknown = sorted(set(chosen) - known.keys())
    if unknown:
        parser.error(f"--only names {unknown[0]!r}; parts are {', '.join(known)}")
    rows: list[Row] = []
    for name in chosen:
        print(f"== {name}", flush=True)
        rows += known[name](short=options.short)
    show(rows)
    write(options.output or options.cache / "bench-serving.json", rows, short=options.short, parts=chosen)
    raise SystemExit(status(rows))


if __name__ == "__main__":
    main()
