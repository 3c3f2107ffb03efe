"""`lorary adapters`: list, show, delete, restore, purge; bytes move in push.py and pull.py, aliases in aliases.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registry.cli import aliases, pull, push
from registry.cli.client import path
from registry.cli.jobs import DEFAULT_TIMEOUT_S, TimeoutOption
from registry.cli.output import clean
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="Adapters: a tenant's named, versioned LoRA weights.", no_args_is_help=True)
noun.add_typer(aliases.noun, name="alias")

NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
ReferenceArgument = Annotated[str, typer.Argument(help="NAME (its default alias), NAME@3 or NAME@ALIAS.")]
DirectoryArgument = Annotated[Path, typer.Argument(help="The folder with adapter_config.json and adapter_model.safetensors.")]
BaseOption = Annotated[str | None, typer.Option("--base-model", help="Else the config's base_model_name_or_path must name exactly one.")]
AliasOption = Annotated[str | None, typer.Option("--alias", help="Move this alias to the version once it is ready.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the version is ready or rejected.")]
DescriptionOption = Annotated[str | None, typer.Option("--description", help="What the adapter is for.")]
SignOption = Annotated[
    Path | None, typer.Option("--sign", help="Sign the files with this private key (PEM, P-256/384/521); writes model.sig into the folder.")
]
TagsOption = Annotated[list[str] | None, typer.Option("--tag", help="A label such as team:red or draft. Repeat for several.")]
TargetArgument = Annotated[Path, typer.Argument(help="The folder to write; created if absent.")]
VersionsArgument = Annotated[str, typer.Argument(help="NAME, or NAME@3 for one version.")]
DeletedOption = Annotated[bool, typer.Option("--deleted", help="What was deleted too, with its times.")]
DELETED_COLUMNS = ("deleted_at", "restorable_until")
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that differ.")]


@remote(noun, "push")
def push_command(
    call: Call,
    *,
    name: NameArgument,
    directory: DirectoryArgument,
    base_model: BaseOption = None,
    alias: AliasOption = None,
    description: DescriptionOption = None,
    sign: SignOption = None,
    tag: TagsOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Push a PEFT adapter folder as a new version. Identical bytes give the version that exists."""
    if alias is not None and not wait:
        raise typer.BadParameter("an alias moves only to a ready version; use --wait with --alias", param_hint="--alias")
    asked = push.Push(name=name, base_model=base_model, description=description, tags=tuple(tag or ()), sign_with=sign)
    version = push.push(call, asked, directory=directory)
    if wait:
        version = push.wait_until_settled(call, name, version["number"], timeout_s=timeout_s)
    if alias is not None and version["status"] == "ready":
        aliases.move(call.client, name, alias, number=version["number"])
    call.output.item(version)
    push.fail_if_rejected(name, version)


@remote(noun, "pull")
def pull_command(call: Call, reference: ReferenceArgument, directory: TargetArgument, force: ForceOption = False) -> None:
    """Download a version's files, byte for byte as they were pushed, checked by sha256."""
    call.output.item(pull.pull(call, reference, directory=directory, force=force))


@remote(noun, "list")
def list_adapters(
    call: Call,
    *,
    text: Annotated[str | None, typer.Option("--search", "-q", help="Words, or their beginnings, of name, description or tags.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="key:value, or a key alone. Repeat for several.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", help="Of this base model.")] = None,
    status: Annotated[str | None, typer.Option("--status", help="With a version that is pending, ready or rejected.")] = None,
    min_rank: Annotated[int | None, typer.Option("--min-rank", min=1, help="With a version of this rank or above.")] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="With a version of this rank or below.")] = None,
    deleted: DeletedOption = False,
) -> None:
    """List adapters, newest first: all, or those that match every option."""
    asked = {"q": text, "tag": tag, "base_model": base_model, "status": status, "min_rank": min_rank, "max_rank": max_rank}
    wanted = {name: value for name, value in asked.items() if value} | _shown(deleted)
    columns = ("name", "base_model", "num_versions", "latest_version", "aliases", "tags", "description", "updated_at")
    call.output.rows(call.client.pages("/adapters", **wanted), *columns, *(DELETED_COLUMNS if deleted else ()))


@remote(noun, "tag")
def tag_command(
    call: Call,
    name: NameArgument,
    tags: Annotated[list[str] | None, typer.Argument(metavar="[TAG]...", help="Tags to add, e.g. team:red.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="A tag to take away. Repeat for several.")] = None,
) -> None:
    """Add tags to an adapter, or take some away; the others stay."""
    call.output.item(call.client.patch(path("adapters", name), {"add_tags": tags or [], "remove_tags": remove or []}))


@remote(noun, "show")
def show(call: Call, name: NameArgument, deleted: DeletedOption = False) -> None:
    """Show one adapter, its versions and its aliases."""
    adapter = call.client.get(path("adapters", name), **_shown(deleted))
    versions = list(call.client.pages(path("adapters", name, "versions"), **_shown(deleted)))
    pointers = [] if adapter["deleted_at"] else aliases.load(call.client, name)
    call.output.item({**adapter, "versions": versions, "aliases": pointers} if call.output.is_json else adapter)
    if not call.output.is_json:
        call.output.line("")
        columns = ("number", "status", "rank", "targets", "version_digest", "created_at")
        call.output.rows(versions, *columns, *((*DELETED_COLUMNS, "purged_at") if deleted else ()))
        call.output.line("")
        call.output.rows(pointers, *aliases.COLUMNS)


@remote(noun, "lineage")
def lineage_command(call: Call, reference: ReferenceArgument) -> None:
    """Show what a version came from and what was made of it."""
    name, number = pull.resolve(call, reference)
    found = call.client.get(path("adapters", name, "versions", number, "lineage"))
    if call.output.is_json:
        call.output.item(found)
        return
    call.output.rows([*found["came_from"], *found["made_into"]], "relation", "kind", "id", "at", "details")


@remote(noun, "card")
def card_command(call: Call, reference: ReferenceArgument) -> None:
    """Show a version's card: who pushed it, from what, with what. Markdown, or all of it with -o json."""
    name, number = pull.resolve(call, reference)
    route = path("adapters", name, "versions", number, "card")
    if call.output.is_json:
        call.output.json(call.client.get(route))
        return
    for line in call.client.text(route, format="markdown").split("\n"):
        call.output.line(clean(line))


@remote(noun, "delete")
def delete(call: Call, reference: VersionsArgument, yes: YesOption = False) -> None:
    """Delete an adapter, or one of its versions. It stops being served at once, and `restore` brings it back."""
    route = _route(reference)
    call.output.confirm(f"Delete {reference}?", yes=yes)
    call.client.delete(route)
    call.output.note(f"{reference} deleted")


@remote(noun, "restore")
def restore(call: Call, reference: VersionsArgument) -> None:
    """Bring back what was deleted, with its aliases. Not what was purged: that must be pushed again."""
    call.output.item(call.client.post(f"{_route(reference)}/restore", {}))


@remote(noun, "purge")
def purge(call: Call, reference: VersionsArgument, yes: YesOption = False) -> None:
    """Give up the bytes of deleted versions for good: of NAME all of them, of NAME@3 that one."""
    route = _route(reference)
    call.output.confirm(f"Purge what is deleted of {reference}? It cannot be restored after that.", yes=yes)
    call.output.item(call.client.post(f"{route}/purge", {}))


def _shown(deleted: bool) -> dict[str, str]:
    return {"show_deleted": "true"} if deleted else {}


def _route(reference: str) -> str:
    name, _, number = reference.partition("@")
    if number and not number.isdecimal():
        raise typer.BadParameter(f"{reference!r}: only a version number can follow @ here; `adapters alias delete` removes an alias")
    return path("adapters", name, "versions", number) if number else path("adapters", name)
