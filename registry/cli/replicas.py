"""`lorary replicas`: the runtimes that serve, and what one of them is doing. For operators."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.client import path
from registry.cli.remote import Call, remote

noun = typer.Typer(help="Replicas: the runtimes that serve, and what they are doing.", no_args_is_help=True)


@remote(noun, "list")
def list_replicas(call: Call) -> None:
    """List replicas as they last reported. Needs an admin key."""
    call.output.rows(
        call.client.pages("/replicas"),
        "id",
        "base_model",
        "state",
        "live",
        "num_running",
        "num_queued",
        "num_free_pages",
        "num_pages",
        "url",
    )


@remote(noun, "state")
def state(call: Call, replica_id: Annotated[str, typer.Argument(metavar="REPLICA")]) -> None:
    """Show what a replica is doing: pool map, slots, queues, mode. Needs an admin key."""
    call.output.json(call.client.get(path("replicas", replica_id, "state")))
