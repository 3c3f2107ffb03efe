"""What the command prints: data on stdout as a table or JSON, messages and progress on stderr.

Colour and width follow the terminal and NO_COLOR (Rich does both); off a terminal a table is one line a row, never cut.
Text that came over the network is cleaned of control characters, so that no tenant's description can drive a terminal.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from registry.cli.failure import CliFailure

Row = Mapping[str, Any]
Advance = Callable[[int], None]
WIDE = 10_000


class Format(StrEnum):
    table = "table"
    json = "json"


class Output:
    """Where one command's data and messages go. Built once a command."""

    def __init__(self, format: Format = Format.table) -> None:
        self.format = format
        self._data = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDE)
        self._messages = Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else WIDE)

    @property
    def is_json(self) -> bool:
        return self.format is Format.json

    def rows(self, items: Iterable[Row], *columns: str) -> None:
        """A listing: a JSON array of whole objects, or a table of `columns` (dotted paths reach inside)."""
        if self.is_json:
            self.json(list(items))
            return
        table = _table(*(name.rsplit(".", 1)[-1].upper().replace("_", " ") for name in columns), no_wrap=not self._data.is_terminal)
        for item in items:
            table.add_row(*(Text(show(pick(item, name))) for name in columns))
        self._print(table)

    def item(self, item: Row) -> None:
        """One object: JSON, or a line a field."""
        if self.is_json:
            self.json(item)
            return
        table = _table("FIELD", "VALUE", no_wrap=not self._data.is_terminal, show_header=False)
        for name, value in item.items():
            table.add_row(Text(name), Text(show(value)))
        self._print(table)

    def _print(self, table: Table) -> None:
        if self._data.is_terminal:
            self._data.print(table)
            return
        with self._data.capture() as captured:
            self._data.print(table)
        for line in captured.get().splitlines():
            self.line(line.rstrip())

    def json(self, value: object) -> None:
        self.line(json.dumps(value, indent=2, ensure_ascii=True))

    def line(self, text: str) -> None:
        """One line of data, exactly as it is."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """Part of a document, exactly as it is."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A message for the person, on stderr."""
        self._messages.print(Text(clean(text)))

    def failure(self, failure: CliFailure) -> None:
        self._messages.print(Text.assemble(("error: ", "bold red"), clean(failure.detail)))
        for name, value in failure.fields.items():
            self._messages.print(Text.assemble((f"  {name}: ", "bold"), clean(value)))
        if failure.remedy:
            self._messages.print(Text.assemble(("  remedy: ", "bold"), clean(failure.remedy)))

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something is destroyed; off a terminal nobody can answer, so `--yes` is required."""
        if yes:
            return
        if not sys.stdin.isatty():
            raise typer.BadParameter(f"{question} Nobody can answer here; repeat the command with --yes.")
        typer.confirm(question, abort=True, err=True)

    @contextmanager
    def progress(self, label: str, *, total_bytes: int) -> Iterator[Advance]:
        """A byte bar on stderr while the block runs; silent off a terminal."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._messages,
            transient=True,
            disable=not self._messages.is_terminal,
        )
        with bar:
            task = bar.add_task(clean(label), total=total_bytes)
            yield lambda count: bar.advance(task, count)

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """A spinner on stderr while the block runs; one plain line off a terminal."""
        if not self._messages.is_terminal:
            self.note(label)
            yield
            return
        with self._messages.status(clean(label)):
            yield


def pick(item: Row, path: str) -> Any:
    """`pick({"a": {"b": 1}}, "a.b")` is 1; None where a step is missing or null."""
    value: Any = item
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def show(value: object) -> str:
    """A value as one table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Sequence) and all(isinstance(part, str | int | float) for part in value):
        return clean(", ".join(map(str, value))) or "-"
    if isinstance(value, Mapping | Sequence):
        return clean(json.dumps(value, ensure_ascii=False))
    return str(value)


def clean(text: str) -> str:
    """Control and direction-changing characters shown as `\\xNN`, newlines as spaces."""
    text = text.replace("\r\n", " ").replace("\n", " ").replace("\t", " ")
    return "".join(char if unicodedata.category(char) not in {"Cc", "Cf"} else f"\\x{ord(char):02x}" for char in text)


def _table(*headers: str, no_wrap: bool, show_header: bool = True) -> Table:
    table = Table(box=None, pad_edge=False, show_header=show_header, header_style="bold")
    for header in headers:
        table.add_column(header, no_wrap=no_wrap, overflow="fold")
    return table
