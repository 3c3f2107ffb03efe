"""`lorary tenants`: create, list, show and delete isolation boundaries. Needs an admin key."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.client import path
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="Tenants: who owns what. Needs an admin key.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The tenant's name.")]


@remote(noun, "create")
def create(call: Call, name: NameArgument) -> None:
    """Create a tenant."""
    call.output.item(call.client.post("/tenants", {"name": name}))


@remote(noun, "list")
def list_tenants(call: Call) -> None:
    """List tenants, newest first."""
    call.output.rows(call.client.pages("/tenants"), "name", "created_at")


@remote(noun, "show")
def show(call: Call, name: NameArgument) -> None:
    """Show one tenant."""
    call.output.item(call.client.get(path("tenants", name)))


@remote(noun, "delete")
def delete(call: Call, name: NameArgument, yes: YesOption = False) -> None:
    """Delete a tenant: its keys stop working at once."""
    call.output.confirm(f"Delete tenant {name} with its keys and adapters?", yes=yes)
    call.client.delete(path("tenants", name))
    call.output.note(f"tenant {name} deleted")
