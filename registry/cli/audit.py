"""`lorary audit`: who changed what, from where, and who was refused."""

from __future__ import annotations

from itertools import islice
from typing import Annotated
from urllib.parse import urlencode

import typer

from registry.cli.remote import Call, remote

noun = typer.Typer(help="The audit log: every change and every refusal.", no_args_is_help=True)

ActorOption = Annotated[str | None, typer.Option("--actor", help="Only changes by the key with this id.")]
ActionOption = Annotated[str | None, typer.Option("--action", help="Only this action, e.g. alias.moved.")]
TypeOption = Annotated[str | None, typer.Option("--resource-type", help="Only of this sort, e.g. adapter.")]
ResourceOption = Annotated[str | None, typer.Option("--resource", help="Only about the thing with this id.")]
SinceOption = Annotated[str | None, typer.Option("--since", help="Not before, e.g. 2026-11-01T00:00:00Z.")]
UntilOption = Annotated[str | None, typer.Option("--until", help="Before, e.g. 2026-12-01T00:00:00Z.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="At most so many, newest first.")]
AfterOption = Annotated[str | None, typer.Option("--after", help="Go on behind the event with this id: the last one that arrived.")]

COLUMNS = ("created_at", "key_id", "action", "outcome", "resource_type", "resource_id", "address", "request_id")
QUIET_S = 60.0


@remote(noun, "list")
def list_events(
    call: Call,
    *,
    actor: ActorOption = None,
    action: ActionOption = None,
    resource_type: TypeOption = None,
    resource: ResourceOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = 100,
) -> None:
    """List events, newest first; `-o json` shows both sides of each change."""
    asked = _asked(actor=actor, action=action, resource_type=resource_type, resource_id=resource, since=since, until=until)
    call.output.rows(islice(call.client.pages("/audit", **asked), limit), *COLUMNS)


@remote(noun, "export")
def export(
    call: Call,
    *,
    actor: ActorOption = None,
    action: ActionOption = None,
    resource_type: TypeOption = None,
    resource: ResourceOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    after: AfterOption = None,
) -> None:
    """Write the log to stdout as JSON Lines, oldest first, however long it is."""
    asked = _asked(actor=actor, action=action, resource_type=resource_type, resource_id=resource, since=since, until=until, after=after)
    with call.client.lines(f"/audit/export?{urlencode(asked)}", headers={}, quiet_s=QUIET_S) as lines:
        for line in lines:
            call.output.line(line)


def _asked(**filters: str | None) -> dict[str, str]:
    return {name: value for name, value in filters.items() if value is not None}
