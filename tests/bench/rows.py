"""The rows of `make bench-serving`: a measured value held to its bar. Every module with such rows has `rows(*, short) -> list[Row]`.

`short`: the same with less work, for a glance; a row says so in `detail`. A module's own `main` ends with `finish(rows(short=...))`.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """`value` must be at least `bar` (`at_most`: at most). `value` None: could not be measured; `bar` None: reported, no more.

    `floor` is the best value that the machine or the method allows, by the rule that `detail` or the module's docstring gives;
    `command` prints this row again; `detail` says what the value was made of (both sides of a ratio, sizes, counts).
    """

    name: str
    value: float | None
    bar: float | None
    command: str
    at_most: bool = False
    floor: float | None = None
    unit: str = "x"
    detail: str = ""

    @property
    def holds(self) -> bool | None:
        """None where there is nothing to judge."""
        if self.value is None or self.bar is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def verdict(self) -> str:
        if self.value is None:
            return "absent"
        return {None: "reported", True: "holds", False: "FALLS SHORT"}[self.holds]

    def line(self) -> str:
        value, floor = ("-" if number is None else f"{number:.3g}" for number in (self.value, self.floor))
        bar = "-" if self.bar is None else f"{'<=' if self.at_most else '>='} {self.bar:g}"
        return f"{self.name:<58} {value:>8} {self.unit:<6} {bar:>8} {floor:>7}  {self.verdict():<11}  {self.detail}".rstrip()


def show(rows: Sequence[Row]) -> None:
    print(f"\n{'':<58} {'measured':>8} {'':<6} {'bar':>8} {'floor':>7}")
    for row in rows:
        print(row.line(), flush=True)


def write(path: Path, rows: Sequence[Row], **settings: Any) -> None:
    """One JSON file: the machine, the commit, what was asked for, the rows with their verdicts."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True).stdout.strip()
    table = [asdict(row) | {"verdict": row.verdict()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"commit": commit, "machine": platform.platform(), "settings": settings, "rows": table}, indent=1) + "\n")
    print(f"written to {path}")


def status(rows: Sequence[Row]) -> int:
    """1 while a row falls short, else 2 where one could not be measured, else 0."""
    verdicts = {row.verdict() for row in rows}
    return 1 if "FALLS SHORT" in verdicts else 2 if "absent" in verdicts else 0


def finish(rows: Sequence[Row]) -> None:
    """What a module's `main` ends with."""
    show(rows)
    raise SystemExit(status(rows))
