"""`lorary usage`: requests and tokens by day, adapter and key."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.remote import Call

DayOption = Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="A day of UTC, included. Default: the last 30 days.")]
GroupOption = Annotated[list[str] | None, typer.Option("--by", help="day, adapter, key or tenant; repeat. Default: the first three.")]
CsvOption = Annotated[bool, typer.Option("--csv", help="CSV on stdout, as the registry gives it.")]

COLUMNS = {"day": ("day",), "tenant": ("tenant",), "adapter": ("adapter", "base_model"), "key": ("key_id",)}
SUMS = ("requests", "cancelled", "failed", "prompt_tokens", "completion_tokens")


def usage(
    call: Call,
    *,
    since: DayOption = None,
    until: DayOption = None,
    adapter: Annotated[str | None, typer.Option(help="Only this adapter, or this base model alone.")] = None,
    key_id: Annotated[str | None, typer.Option("--key", help="Only requests of this key, by its id.")] = None,
    by: GroupOption = None,
    csv: CsvOption = False,
) -> None:
    """Show requests and tokens by day, adapter and key."""
    named = {"since": since, "until": until, "adapter": adapter, "key_id": key_id}
    params = {name: value for name, value in named.items() if value is not None}
    groups = by or ["day", "adapter", "key"]
    if csv:
        with call.client.download("/usage", format="csv", group_by=groups, **params) as chunks:
            for chunk in chunks:
                call.output.text(chunk.decode())
        return
    columns = [column for group in groups for column in COLUMNS.get(group, ())]
    call.output.rows(call.client.pages("/usage", limit=500, group_by=groups, **params), *columns, *SUMS)
