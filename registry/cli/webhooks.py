"""`lorary webhooks`: where this tenant hears of what happens, and what became of each delivery."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.client import Json, path
from registry.cli.failure import CliFailure
from registry.cli.jobs import poll
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="Webhooks: signed HTTP calls when something happens.", no_args_is_help=True)

IdArgument = Annotated[str, typer.Argument(help="The webhook's id.")]
EventOption = Annotated[list[str] | None, typer.Option("--event", "-e", help="Repeat for several, e.g. version.ready. Default: all.")]
DescriptionOption = Annotated[str, typer.Option("--description", help="What it is for.")]
OverlapOption = Annotated[int, typer.Option("--overlap-s", min=0, help="Seconds for which the old secret signs too.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the first attempt.")]

COLUMNS = ("id", "url", "event_types", "enabled", "disabled_reason", "created_at")


@remote(noun, "create")
def create(
    call: Call,
    target: Annotated[str, typer.Argument(metavar="TARGET_URL", help="https://...")],
    event: EventOption = None,
    description: DescriptionOption = "",
) -> None:
    """Call a URL when something happens. The signing secret is printed now and never again."""
    call.output.item(call.client.post("/webhooks", {"url": target, "event_types": event or ["*"], "description": description}))
    call.output.note("the secret above cannot be shown again: store it now")


@remote(noun, "list")
def list_webhooks(call: Call) -> None:
    """List webhooks."""
    call.output.rows(call.client.list("/webhooks"), *COLUMNS)


@remote(noun, "show")
def show(call: Call, webhook_id: IdArgument) -> None:
    """Show one webhook."""
    call.output.item(call.client.get(path("webhooks", webhook_id)))


@remote(noun, "delete")
def delete(call: Call, webhook_id: IdArgument, yes: YesOption = False) -> None:
    """Delete a webhook and its delivery log."""
    call.output.confirm(f"Delete webhook {webhook_id}? What is pending will not be delivered.", yes=yes)
    call.client.delete(path("webhooks", webhook_id))
    call.output.note(f"webhook {webhook_id} deleted")


@remote(noun, "rotate")
def rotate(call: Call, webhook_id: IdArgument, overlap_s: OverlapOption = 86_400) -> None:
    """Replace the signing secret. The new one is printed now and never again."""
    call.output.item(call.client.post(f"{path('webhooks', webhook_id)}/rotate", {"overlap_s": overlap_s}))
    call.output.note("the secret above cannot be shown again: store it now")


@remote(noun, "deliveries")
def deliveries(call: Call, webhook_id: IdArgument) -> None:
    """The delivery log, newest event first."""
    rows = call.client.pages(f"{path('webhooks', webhook_id)}/deliveries")
    call.output.rows(rows, "id", "event_type", "state", "attempt", "next_attempt_at", "created_at", "finished_at")


@remote(noun, "replay")
def replay(call: Call, webhook_id: IdArgument, delivery_id: Annotated[str, typer.Argument(help="From `deliveries`.")]) -> None:
    """Deliver an event again, under its old webhook-id."""
    call.output.item(call.client.post(f"{path('webhooks', webhook_id)}/deliveries/{path(delivery_id)[1:]}/replay", {}))


@remote(noun, "ping")
def ping(call: Call, webhook_id: IdArgument, timeout_s: TimeoutOption = 30.0) -> None:
    """Send a test event and wait for the first attempt. Exit code 1 unless the receiver took it."""
    made = call.client.post(f"{path('webhooks', webhook_id)}/ping", {})
    route = f"{path('webhooks', webhook_id)}/deliveries{path(made['id'])}"

    def look() -> Json | None:
        delivery = call.client.get(route)
        return delivery if delivery["attempts"] else None

    delivery = poll(look, timeout_s=timeout_s, what="the ping")
    call.output.item(delivery)
    if delivery["state"] != "delivered":
        last = delivery["attempts"][-1]
        raise CliFailure(f"the receiver did not take it: {last['detail'] or last['status']}", remedy="mend it; the ping is tried again")
