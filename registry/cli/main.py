"""The `lorary` command: its nouns, and the one place where errors become exit codes (0 ok, 1 failure, 2 usage)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from registry.cli import (
    adapters,
    audit,
    base_models,
    db,
    doctor,
    gc,
    hub,
    jobs,
    keys,
    processes,
    quotas,
    replicas,
    secrets,
    signing,
    tenants,
    top,
    up,
    usage,
    waiting,
    webhooks,
)
from registry.cli.failure import CliFailure
from registry.cli.output import Output
from registry.cli.remote import remote
from registry.logging import configure_logging

app = typer.Typer(
    name="lorary",
    help="Registry, control plane and runtime for LoRA adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("api")(processes.api)
app.command("worker")(processes.worker)
app.command("runtime")(processes.runtime)
app.command("doctor")(doctor.doctor)
app.command("wait")(waiting.wait)
remote(app, "usage")(usage.usage)
remote(app, "top")(top.top)
app.add_typer(db.noun, name="db")
app.add_typer(tenants.noun, name="tenants")
app.add_typer(keys.noun, name="keys")
app.add_typer(base_models.noun, name="base-models")
app.add_typer(adapters.noun, name="adapters")
app.add_typer(audit.noun, name="audit")
app.add_typer(hub.noun, name="hub")
app.add_typer(gc.noun, name="gc")
app.add_typer(jobs.noun, name="jobs")
app.add_typer(quotas.noun, name="quotas")
app.add_typer(replicas.noun, name="replicas")
app.add_typer(secrets.noun, name="secrets")
app.add_typer(signing.keys_noun, name="signing-keys")
app.add_typer(signing.policy_noun, name="signing-policy")
app.add_typer(webhooks.noun, name="webhooks")


def _show_version(wanted: bool) -> None:
    if wanted:
        Output().line(f"lorary {version('lorary')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and exit the process with its code."""
    configure_logging(format="console", level="WARNING")  # what our own libraries log goes to stderr, never between data
    try:
        app(args=args, prog_name="lorary")
    except CliFailure as failure:
        Output().failure(failure)
        sys.exit(1)
    except OSError as error:  # a folder that cannot be read, a disk that is full
        Output().failure(CliFailure(f"{error.filename or 'input/output'}: {error.strerror or error}"))
        sys.exit(1)


if __name__ == "__main__":
    main()
