"""`lorary quotas`: what a tenant may use and what it uses. Tenants see their own, operators see and set all."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from registry.cli.client import Json, path
from registry.cli.remote import Call, remote

noun = typer.Typer(help="Quotas: what a tenant may use, and what it uses.", no_args_is_help=True)

SIZE = re.compile(r"(\d+)([KMGT]i?B?|B)?", re.IGNORECASE)
POWERS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}
WORDS = {"unlimited": "unlimited", "default": None}


def parse_limit(text: str) -> int | str | None:
    """A number, a size such as 10GiB or 10G (powers of 1024), `unlimited`, or `default` for the operator's."""
    if text in WORDS:
        return WORDS[text]
    match = SIZE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no limit: give a number, a size such as 10GiB, 'unlimited' or 'default'")
    power: int = POWERS[(match[2] or "")[:1].lower()]
    return int(match[1]) << 10 * power


Limit = Annotated[str | None, typer.Option(metavar="LIMIT", help="A number, 'unlimited', or 'default' for the operator's.")]
Size = Annotated[str | None, typer.Option(metavar="LIMIT", help="Like the others; sizes such as 10GiB are understood.")]


@remote(noun, "show")
def show(call: Call, name: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Default: the key's own.")] = None) -> None:
    """Show limits and use."""
    _print(call, call.client.get("/quota" if name is None else path("tenants", name, "quota")))


@remote(noun, "set")
def set_limits(
    call: Call,
    name: Annotated[str, typer.Argument(metavar="TENANT")],
    *,
    bytes: Size = None,
    adapters: Limit = None,
    versions_per_day: Limit = None,
    running_jobs: Limit = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
) -> None:
    """Set limits of a tenant; those that are not given stay. Needs an admin key."""
    given = {
        "bytes": bytes,
        "adapters": adapters,
        "versions_per_day": versions_per_day,
        "running_jobs": running_jobs,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    wanted = {measure: parse_limit(text) for measure, text in given.items() if text is not None}
    if not wanted:
        raise typer.BadParameter("name at least one limit, such as --bytes 10GiB")
    _print(call, call.client.patch(path("tenants", name, "quota"), wanted))


def _print(call: Call, quota: Json) -> None:
    if call.output.is_json:
        call.output.item(quota)
        return
    rows = [{"quota": measure, **values} for measure, values in quota.items() if isinstance(values, dict)]
    for row in rows:
        row["limit"] = "unlimited" if row["limit"] is None else row["limit"]
    call.output.rows(rows, "quota", "limit", "used", "reserved", "source")
