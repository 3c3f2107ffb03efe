"""Rows say what they should, and a bench ends with 1 where one falls short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.rows import Row, finish, status, write


def row(value: float | None, bar: float | None = 1.0, *, at_most: bool = False) -> Row:
    return Row("what", value, bar, "command", at_most=at_most)


def test_verdicts_and_what_a_bench_ends_with(tmp_path: Path) -> None:
    assert [row(1.0).verdict(), row(0.9).verdict(), row(1.1, at_most=True).verdict()] == ["holds", "FALLS SHORT", "FALLS SHORT"]
    assert [row(None).verdict(), row(0.9, None).verdict()] == ["absent", "reported"]
    assert (status([row(1.0)]), status([row(1.0), row(None)]), status([row(None), row(0.9)])) == (0, 2, 1)
    with pytest.raises(SystemExit) as end:
        finish([row(1.0), row(0.5)])
    assert end.value.code == 1
    write(tmp_path / "out" / "rows.json", [row(0.5)], short=True)
    written = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert (written["rows"][0]["verdict"], written["settings"]) == ("FALLS SHORT", {"short": True})
