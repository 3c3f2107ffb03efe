"""What every command that talks to a registry has in common: `--url`, `--tenant`, `-o`, and the key.

Flag beats environment beats the state directory's files. Keys are never flags: a flag ends up in the shell's history.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from registry.cli.client import RegistryClient
from registry.cli.credentials import load_key
from registry.cli.failure import CliFailure
from registry.cli.output import Format, Output
from registry.cli.state import read_up
from registry.config import CliSettings

DEFAULT_URL = "http://127.0.0.1:8420"

OutputOption = Annotated[Format, typer.Option("--output", "-o", help="How to print data on stdout.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="The registry. Else LORARY_URL, else the one that `lorary up` runs here.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="Act inside this tenant (admin keys). Else LORARY_TENANT.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dataclass(frozen=True)
class Call:
    """One command's connection and output."""

    client: RegistryClient
    output: Output
    state_dir: Path


def remote(noun: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(call, ...)` as `lorary NOUN NAME`, with the three common options added after its own."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        noun.command(name, help=inspect.getdoc(function))(_with_connection(function))
        return function

    return register


def _with_connection(function: Callable[..., None]) -> Callable[..., None]:
    """A function whose signature, as Typer reads it, is `function`'s without `call` plus the common options."""

    def run(*, url: str | None, tenant: str | None, output: Format, **arguments: Any) -> None:
        with connect(url, tenant=tenant, output=output) as call:
            function(call, **arguments)

    hints = get_type_hints(function, include_extras=True)
    own = [parameter.replace(annotation=hints[parameter.name]) for parameter in list(inspect.signature(function).parameters.values())[1:]]
    common = [_common("url", UrlOption, None), _common("tenant", TenantOption, None), _common("output", OutputOption, Format.table)]
    run.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *common]}
    return run


def _common(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@contextmanager
def connect(url: str | None, *, tenant: str | None = None, output: Format = Format.table) -> Iterator[Call]:
    """The connection that flags, environment and files name; closed at the end of the block."""
    settings = CliSettings()
    where = registry_url(url, settings=settings)
    key = settings.api_key.get_secret_value() or load_key(settings.state_dir, where)
    with RegistryClient(where, token=key, tenant=tenant or settings.tenant or None) as client:
        yield Call(client=client, output=Output(output), state_dir=settings.state_dir)


def registry_url(url: str | None, *, settings: CliSettings) -> str:
    """Flag, environment, the running `lorary up` of the state directory, the default port; without a trailing slash."""
    running = read_up(settings.state_dir)
    found = url or settings.url or (running.url if running else DEFAULT_URL)
    if not found.startswith(("http://", "https://")):
        raise CliFailure(f"the registry's URL is {found!r}", remedy="give one that starts with http:// or https://", field="url")
    return found.rstrip("/")
