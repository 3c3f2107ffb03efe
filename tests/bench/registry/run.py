"""`make bench-registry`: Lorary's registry beside the MLflow server, both on one PostgreSQL, and pushes beside raw S3, in one run.
What an idle registry needs to authorise, and what watchers cost (`company.py`), come after.

Rounds alternate between the two servers, so both see the same noise. A row is the median of its rounds; its bar is a ratio, because
absolute times on a shared machine mean nothing. Ends with 1 while a row falls short, and with 2 where the peer is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench import blob_push
from tests.bench.peers.mlflow.driver import MLflow, install
from tests.bench.registry import company
from tests.bench.registry.generator import Sample, ceiling, measure
from tests.bench.registry.lorary import Lorary
from tests.bench.registry.world import OPERATIONS, Side, World, cpu_s, stop
from tests.postgresql import PostgreSQL

MIN_RATIO, MAX_P99_RATIO = 3.0, 1 / 3


@dataclass(frozen=True)
class Row:
    """One figure and its bar: `ratio` at least (`most` False) or at most that."""

    name: str
    ours: float
    theirs: float | None
    bar: float
    most: bool
    unit: str

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def holds(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio <= self.bar if self.most else self.ratio >= self.bar

    def line(self) -> str:
        verdict = {None: "absent", True: "holds", False: "FALLS SHORT"}[self.holds]
        theirs, ratio = ("-" if value is None else f"{value:.2f}" for value in (self.theirs, self.ratio))
        bar = f"{'<=' if self.most else '>='} {self.bar:.2f}"
        return f"{self.name:<44} {self.ours:>9.2f} {theirs:>9} {self.unit:<6} {ratio:>6} {bar:>8}  {verdict}"


@dataclass(frozen=True)
class Round:
    """One turn of one side at one operation."""

    per_s: float
    median_ms: float
    p99_ms: float
    server_cpu_s: float
    per_server_cpu_s: float
    own_cpu_s: float
    load: float
    others: dict[str, int]


def turn(side: Side, operation: str, world: World, *, seconds: float) -> Round:
    clients = [side.requests(operation, client=number) for number in range(world.clients)]
    cpu, own = cpu_s(side.process), time.process_time()
    sample: Sample = measure(clients, port=side.port, status=side.statuses[operation], seconds=seconds)
    server_cpu_s = cpu_s(side.process) - cpu
    done = Round(
        per_s=sample.per_s,
        median_ms=1000 * sample.median,
        p99_ms=1000 * sample.quantile(0.99),
        server_cpu_s=server_cpu_s,
        per_server_cpu_s=sample.num_replies / server_cpu_s,
        own_cpu_s=time.process_time() - own,
        load=os.getloadavg()[0],
        others=dict(sample.others),
    )
    print(
        f"  {operation:<15} {side.name:<7} {done.per_s:>7.0f}/s  median {done.median_ms:>7.1f} ms  p99 {done.p99_ms:>7.1f} ms  "
        f"cpu server {done.server_cpu_s:>4.1f} s ({done.per_server_cpu_s:.0f} operations/s of it), "
        f"generator {done.own_cpu_s:.1f} s, load {done.load:.1f} {done.others or ''}",
        flush=True,
    )
    return done


def compare(sides: list[Side], world: World, *, rounds: int, seconds: float) -> dict[str, dict[str, list[Round]]]:
    found: dict[str, dict[str, list[Round]]] = {operation: {side.name: [] for side in sides} for operation in OPERATIONS}
    for number in range(rounds):
        print(f"round {number + 1}", flush=True)
        for operation in OPERATIONS:
            for side in sides if number % 2 == 0 else reversed(sides):
                found[operation][side.name].append(turn(side, operation, world, seconds=seconds))
    return found


def rows(found: dict[str, dict[str, list[Round]]]) -> list[Row]:
    made = []
    for operation, by_side in found.items():
        for what, of, bar, most, unit in (
            ("operations", _per_s, MIN_RATIO, False, "/s"),
            ("p99", _p99, MAX_P99_RATIO, True, "ms"),
        ):
            ours, theirs = (_median(by_side.get(name, []), of) for name in ("lorary", "mlflow"))
            assert ours is not None, "we measured ourselves"
            made.append(Row(f"{operation}, {what}", ours, theirs, bar, most, unit))
    return made


def _per_s(one: Round) -> float:
    return one.per_s


def _p99(one: Round) -> float:
    return one.p99_ms


def _efficiency(found: dict[str, dict[str, list[Round]]]) -> list[str]:
    """For the reader, without a bar: what is left when waits, the generator and the machine's other users are taken away."""
    lines = []
    for operation, by_side in found.items():
        sides = (f"{name} {_median(taken, lambda one: one.per_server_cpu_s):.0f}" for name, taken in by_side.items() if taken)
        lines.append(f"{operation:<44} {', '.join(sides)}")
    return lines


def _median(rounds: list[Round], of: Callable[[Round], float]) -> float | None:
    return statistics.median(of(one) for one in rounds) if rounds else None


def measure_registries(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[Round]]]:
    world = World(adapters=options.adapters, clients=options.clients, workers=options.workers)
    server = PostgreSQL(folder / "pg", durable=True)
    sides: list[Side] = []
    program = None if options.without_mlflow else install(options.cache)
    try:
        with server.installation() as ours, server.empty_database() as theirs:
            print(f"filling both with {world.adapters} adapters", flush=True)
            sides.append(Lorary(server, ours, folder / "lorary", world))
            if program is not None:
                sides.append(MLflow(program, server, theirs, folder / "mlflow", world))
            found = compare(sides, world, rounds=options.rounds, seconds=options.seconds)
            for side in sides:
                stop(side.process)
            return found
    finally:
        for side in sides:
            stop(side.process)
        server.stop()


def main() -> None:
    options = _options()
    own = ceiling(clients=options.clients)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"the generator alone: {own:.0f} operations/s against a server that does nothing; {options.clients} clients, ", end="")
    print(f"{options.workers} worker processes a server, medians of {options.rounds} rounds of {options.seconds:g} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="lorary-bench-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)  # PostgreSQL runs as a user of its own where we are root
        found = measure_registries(options, Path(name))
        beside = company.run(Path(name) / "beside", clients=options.clients, workers=options.workers, rounds=3, seconds=options.seconds)
    made = [*rows(found), *(Row(one.name, one.ours, one.theirs, one.bar, True, "ms") for one in beside)]
    if not options.without_pushes:
        made += [Row(one.name, one.ours_s, one.raw_s, one.bar, True, "s") for one in blob_push.run(rounds=options.rounds, large_mib=192)]
    print("\noperations a second of the servers' processor time (PostgreSQL's apart)")
    for line in _efficiency(found):
        print(line)
    print(f"\n{'':<44} {'ours':>9} {'theirs':>9} {'':<6} {'ratio':>6} {'bar':>8}")
    for row in made:
        print(row.line())
    _write(options.output, made, found, own=own, options=options)
    raise SystemExit(1 if any(row.holds is False for row in made) else 2 if any(row.holds is None for row in made) else 0)


def _write(path: Path, made: list[Row], found: dict[str, dict[str, list[Round]]], *, own: float, options: argparse.Namespace) -> None:
    rounds = {operation: {name: [asdict(one) for one in taken] for name, taken in sides.items()} for operation, sides in found.items()}
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | float | bool)}
    table = [asdict(row) | {"ratio": row.ratio, "holds": row.holds} for row in made]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "generator_per_s": own, "rows": table, "rounds": rounds}, indent=1) + "\n")
    print(f"written to {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--adapters", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--without-mlflow", action="store_true", help="our own figures alone")
    parser.add_argument("--without-pushes", action="store_true", help="leave the rows about S3 out")
    options = parser.parse_args()
    options.output = options.output or options.cache / "bench-registry.json"
    return options


if __name__ == "__main__":
    main()
