"""`lorary adapters alias`: names that move between versions, by compare-and-swap."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.client import ApiProblem, Json, RegistryClient, path
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="Aliases: names that move between versions of one adapter.", no_args_is_help=True)

COLUMNS = ("alias", "version", "generation", "version_digest", "updated_at")

AdapterArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
AliasArgument = Annotated[str, typer.Argument(help="The alias, e.g. default or prod.")]
NumberArgument = Annotated[int, typer.Argument(min=1, help="The version's number.")]
ExpectOption = Annotated[
    int | None, typer.Option("--expect", min=0, help="Move only from this generation; 0 means that it must not exist yet.")
]


@remote(noun, "list")
def list_aliases(call: Call, name: AdapterArgument) -> None:
    """List an adapter's aliases."""
    call.output.rows(load(call.client, name), *COLUMNS)


@remote(noun, "set")
def set_alias(call: Call, name: AdapterArgument, alias: AliasArgument, number: NumberArgument, expect: ExpectOption = None) -> None:
    """Point an alias at a version. Someone else's move in between makes this one fail, not vanish."""
    call.output.item(move(call.client, name, alias, number=number, expect=expect))


@remote(noun, "history")
def history(call: Call, name: AdapterArgument, alias: AliasArgument) -> None:
    """Show where an alias pointed, newest first."""
    call.output.rows(
        call.client.pages(f"{path('adapters', name, 'aliases', alias)}/history"), "generation", "version", "moved_by", "moved_at"
    )


@remote(noun, "delete")
def delete(call: Call, name: AdapterArgument, alias: AliasArgument, yes: YesOption = False) -> None:
    """Remove an alias; the version that it named stays."""
    call.output.confirm(f"Delete alias {name}@{alias}?", yes=yes)
    route = path("adapters", name, "aliases", alias)
    call.client.delete(route, headers={"If-Match": _etag(call.client, route) or "*"})
    call.output.note(f"alias {name}@{alias} deleted")


def load(client: RegistryClient, name: str) -> list[Json]:
    return client.list(path("adapters", name, "aliases"))


def move(client: RegistryClient, name: str, alias: str, *, number: int, expect: int | None = None) -> Json:
    """Point `alias` at version `number`: from generation `expect`, or from whatever it is at this moment."""
    route = path("adapters", name, "aliases", alias)
    etag = _etag(client, route) if expect is None else f'"{expect}"' if expect else None
    condition = {"If-Match": etag} if etag else {"If-None-Match": "*"}
    return client.put(route, {"version": number}, headers=condition)


def _etag(client: RegistryClient, route: str) -> str | None:
    try:
        return client.request("GET", route).headers.get("ETag")
    except ApiProblem as problem:
        if problem.status == 404:
            return None
        raise
