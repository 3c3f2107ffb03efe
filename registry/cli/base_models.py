"""`lorary base-models`: the frozen weights that adapters belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from registry.cli.client import Json, RegistryClient, path
from registry.cli.failure import CliFailure
from registry.cli.jobs import DEFAULT_TIMEOUT_S, TimeoutOption, poll
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="Base models: frozen weights that adapters belong to.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The base model's name.")]
SourceArgument = Annotated[
    str, typer.Argument(help="A folder with config.json and safetensors, a .gguf file, package:NAME, or hub:ORG/NAME[@REVISION].")
]
UpstreamOption = Annotated[
    list[str] | None, typer.Option("--upstream-name", help="A base_model_name_or_path that means this model. Repeatable.")
]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is ready or failed.")]

EndpointOption = Annotated[str | None, typer.Option("--endpoint", help="hub: another hub, one of those that the operator lists.")]
TokenOption = Annotated[
    str | None, typer.Option("--token-secret", help="hub: the secret of the tenant in --tenant that holds a token for the hub.")
]

PACKAGE, HUB = "package:", "hub:"


@remote(noun, "add")
def add(
    call: Call,
    *,
    name: NameArgument,
    source: SourceArgument,
    upstream_name: UpstreamOption = None,
    endpoint: EndpointOption = None,
    token_secret: TokenOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Register a base model from files that a worker's machine holds or downloads from a hub. Needs an admin key."""
    hub = {"endpoint": endpoint, "token_secret": token_secret}
    model = register(call.client, name, source, upstream_names=upstream_name or [], hub=hub)
    if wait and model["status"] == "pending":
        with call.output.waiting(f"importing {name}"):
            model = wait_until_settled(call.client, name, timeout_s=timeout_s)
    call.output.item(model)
    fail_unless_ready(model)


@remote(noun, "list")
def list_base_models(call: Call) -> None:
    """List base models."""
    call.output.rows(call.client.pages("/base-models"), "name", "status", "base_digest", "upstream_names", "created_at")


@remote(noun, "show")
def show(call: Call, name: NameArgument) -> None:
    """Show one base model."""
    call.output.item(call.client.get(path("base-models", name)))


@remote(noun, "delete")
def delete(call: Call, name: NameArgument, yes: YesOption = False) -> None:
    """Delete a base model that no version uses. Needs an admin key."""
    call.output.confirm(f"Delete base model {name}?", yes=yes)
    call.client.delete(path("base-models", name))
    call.output.note(f"base model {name} deleted")


def register(
    client: RegistryClient, name: str, source: str, *, upstream_names: list[str], hub: Mapping[str, str | None] | None = None
) -> Json:
    """Ask the registry to import a base model; answers the row at once, pending. `hub`: what a hub's source says beside its location."""
    given = {field: value for field, value in (hub or {}).items() if value is not None}
    return client.post("/base-models", {"name": name, "source": parse_source(source) | given, "upstream_names": upstream_names})


def wait_until_settled(client: RegistryClient, name: str, *, timeout_s: float) -> Json:
    """The base model once it is ready or failed."""

    def look() -> Json | None:
        model = client.get(path("base-models", name))
        return model if model["status"] != "pending" else None

    return poll(look, timeout_s=timeout_s, what=f"the import of {name}")


def fail_unless_ready(model: Json) -> None:
    if model["status"] == "failed":
        reason = model.get("reason") or {}
        raise CliFailure(
            f"base model {model['name']} could not be imported: {reason.get('detail')}",
            remedy="correct its source and add it again",
            code=reason.get("code"),
            source=model["source"]["location"],
        )


def parse_source(text: str) -> dict[str, str]:
    """`{"kind", "location"}` of a folder, a .gguf file, package:NAME or hub:ORG/NAME. Paths are made absolute."""
    if text.startswith(HUB):
        return {"kind": "hub", "location": text.removeprefix(HUB)}
    if text.startswith(PACKAGE):
        return {"kind": "package", "location": text.removeprefix(PACKAGE)}
    kind = "gguf" if text.lower().endswith(".gguf") else "directory"
    return {"kind": kind, "location": str(Path(text).expanduser().absolute())}
