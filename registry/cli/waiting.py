"""`lorary wait`: until a registry can do its work. For what starts beside it: deployments, scripts, tests of an installation."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from registry.cli.client import RegistryClient
from registry.cli.failure import CliFailure
from registry.cli.output import Format, Output
from registry.cli.remote import OutputOption, UrlOption, registry_url
from registry.config import CliSettings

PAUSE_S = 1.0


def wait(
    url: UrlOption = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Seconds; then exit code 1.")] = 300.0,
    output: OutputOption = Format.table,
) -> None:
    """Wait until the registry is ready: its database, schema and blob store too. Needs no key."""
    where = registry_url(url, settings=CliSettings())
    until = time.monotonic() + timeout_s
    with RegistryClient(where, timeout_s=5.0) as client:
        while (trouble := _trouble(client)) is not None:
            if time.monotonic() >= until:
                raise CliFailure(f"{where} is not ready after {timeout_s:g} s: {trouble}", remedy="see its log, or its /readyz")
            time.sleep(PAUSE_S)
    Output(output).item({"url": where, "ready": True})


def _trouble(client: RegistryClient) -> str | None:
    """What is in the way; None when nothing is."""
    try:
        status, body = client.probe("/readyz")
    except CliFailure as away:
        return away.detail
    return None if status == 200 else str(body.get("checks", status))
