"""`lorary tenants`: create, list, show and delete isolation boundaries. Needs an admin key."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.client import path
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="Tenants: who owns what. Needs an admin key.", no_args_is_help=True)

DeletedOption = Annotated[bool, typer.Option("--deleted", help="Deleted ones too.")]
NameArgument = Annotated[str, typer.Argument(help="The tenant's name.")]


@remote(noun, "create")
def create(call: Call, name: NameArgument) -> None:
    """Create a tenant."""
    call.output.item(call.client.post("/tenants", {"name": name}))


@remote(noun, "list")
def list_tenants(call: Call, deleted: DeletedOption = False) -> None:
    """List tenants, newest first."""
    shown = {"show_deleted": "true"} if deleted else {}
    columns = ("deleted_at", "purge_requested_at") if deleted else ()
    call.output.rows(call.client.pages("/tenants", **shown), "name", "created_at", *columns)


@remote(noun, "show")
def show(call: Call, name: NameArgument) -> None:
    """Show one tenant."""
    call.output.item(call.client.get(path("tenants", name)))


@remote(noun, "delete")
def delete(call: Call, name: NameArgument, yes: YesOption = False) -> None:
    """Delete a tenant: its keys stop working at once. `restore` undoes it until its bytes are purged."""
    call.output.confirm(f"Delete tenant {name} with its keys and adapters?", yes=yes)
    call.client.delete(path("tenants", name))
    call.output.note(f"tenant {name} deleted")


@remote(noun, "restore")
def restore(call: Call, name: NameArgument) -> None:
    """Undo the deletion of a tenant: its keys work again."""
    call.output.item(call.client.post(f"{path('tenants', name)}/restore", {}))


@remote(noun, "purge")
def purge(call: Call, name: NameArgument, yes: YesOption = False) -> None:
    """Erase what a deleted tenant holds, without waiting for the retention time. The next `lorary gc run` removes its bytes."""
    call.output.confirm(f"Erase every adapter and blob of the deleted tenant {name}? It cannot be restored after that.", yes=yes)
    call.output.item(call.client.post(f"{path('tenants', name)}/purge", {}))
