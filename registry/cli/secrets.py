"""`lorary secrets`: what a tenant hands over to be used on its behalf. Values come from stdin and are never shown."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer

from registry.cli.client import path
from registry.cli.failure import CliFailure
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="Secrets: tokens that Lorary uses for you, stored encrypted.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The secret's name, e.g. hub-token.")]


@remote(noun, "set")
def set_secret(call: Call, name: NameArgument) -> None:
    """Read a value from stdin (or a hidden prompt) and store it encrypted; replaces the one before."""
    value = getpass.getpass(f"{name}: ", stream=sys.stderr) if sys.stdin.isatty() else sys.stdin.read().rstrip("\r\n")
    if not value:
        raise CliFailure("no value on stdin", remedy=f"pipe it in: `lorary secrets set {name} < file`")
    call.output.item(call.client.put(path("secrets", name), {"value": value}, headers={}))


@remote(noun, "list")
def list_secrets(call: Call) -> None:
    """List names. Values cannot be read back."""
    call.output.rows(call.client.list("/secrets"), "name", "created_at", "updated_at", "updated_by")


@remote(noun, "delete")
def delete(call: Call, name: NameArgument, yes: YesOption = False) -> None:
    """Forget a secret."""
    call.output.confirm(f"Delete secret {name}? What uses it will fail.", yes=yes)
    call.client.delete(path("secrets", name))
    call.output.note(f"secret {name} deleted")
