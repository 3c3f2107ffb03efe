"""`lorary db`: the schema of the installation in LORARY_STATE_DIR / LORARY_DATABASE_URL. Works on the database itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registry.cli.failure import CliFailure
from registry.cli.output import Format, Output
from registry.cli.remote import OutputOption, YesOption
from registry.config import FirstKeys, load_settings

noun = typer.Typer(help="The database's schema, and the first admin key.", no_args_is_help=True)


PatienceOption = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait for a database that does not answer.")]


@noun.command("init")
def init(timeout_s: PatienceOption = 0.0, output: OutputOption = Format.table) -> None:
    """Make the secret key, the schema and the first admin key where they are missing. The key is printed this once.

    LORARY_FIRST_ADMIN_KEY and LORARY_REPLICA_KEY, from `lorary keys generate`, are stored instead: then nothing is printed.
    """
    from registry.cli import local  # noqa: PLC0415 - the database stack takes a second to import

    out, keys, settings = Output(output), FirstKeys(), load_settings()
    if timeout_s:
        local.wait_for_server(settings, timeout_s=timeout_s)
    settings, token = local.initialise(settings, keys=keys)
    revision, _head = local.schema_state(settings)
    out.item({"state_dir": str(settings.state_dir), "revision": revision, "admin_key": token})
    out.note(
        "the admin key above cannot be shown again: store it now" if token else "no key was made: they are those that exist or were given"
    )


@noun.command("wait")
def wait(
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Seconds; then exit code 1.")] = 600.0,
    output: OutputOption = Format.table,
) -> None:
    """Wait until the schema is one that this program can serve: made by another process, at head or by a later release.

    Needs LORARY_DATABASE_URL alone. What starts beside a migration waits with it, instead of failing until it is through.
    """
    from registry.cli import local  # noqa: PLC0415 - as above

    Output(output).item({"revision": local.wait_for_schema(load_settings(), timeout_s=timeout_s)})


@noun.command("admin-key")
def admin_key(
    name: Annotated[str, typer.Argument(help="What it is for; shown in listings.")] = "made by lorary db admin-key",
    output: OutputOption = Format.table,
) -> None:
    """Make another admin key, where the first one was lost. Printed this once, and audited."""
    from registry.cli import local  # noqa: PLC0415 - as above

    settings = load_settings()
    if not settings.secret_key.get_secret_value():
        raise CliFailure(f"{settings.state_dir} has no secret key", remedy="run `lorary db init` first")
    Output(output).item({"admin_key": local.issue_admin_key(settings, name=name)})


@noun.command("reseal")
def reseal(output: OutputOption = Format.table) -> None:
    """Encrypt every stored secret anew under LORARY_SECRET_KEY. Then LORARY_SECRET_KEY_PREVIOUS is no longer needed for them."""
    from registry.cli import local  # noqa: PLC0415 - as above

    report = local.reseal_secrets(load_settings())
    Output(output).item({"total": report.total, "resealed": report.num_old, "unreadable": list(report.unreadable)})
    if report.unreadable:
        raise CliFailure(f"{len(report.unreadable)} secrets cannot be decrypted and stay as they are", remedy="see `lorary doctor`")


@noun.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")], output: OutputOption = Format.table
) -> None:
    """Copy the embedded SQLite database, consistent while it is in use. Blobs and the secret key are copied after it."""
    from registry.cli import local  # noqa: PLC0415 - as above

    Output(output).item({"file": str(file), "bytes": local.backup(load_settings(), file)})


@noun.command("upgrade")
def upgrade(revision: Annotated[str, typer.Argument(help="A revision, or head.")] = "head", output: OutputOption = Format.table) -> None:
    """Bring the schema to a revision."""
    from registry.cli import local  # noqa: PLC0415 - as above

    Output(output).item({"revision": local.upgrade(load_settings(), revision)})


@noun.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="A revision, -1, or base.")], yes: YesOption = False, output: OutputOption = Format.table
) -> None:
    """Take the schema back to a revision. What only newer ones can hold is lost."""
    from registry.cli import local  # noqa: PLC0415 - as above

    out = Output(output)
    out.confirm(f"Downgrade the schema to {revision}? Data that it cannot hold is lost.", yes=yes)
    out.item({"revision": local.downgrade(load_settings(), revision)})


@noun.command("check")
def check(output: OutputOption = Format.table) -> None:
    """Is the schema at head, and does it say what the models say? Exit code 1 if not."""
    from registry.cli import local  # noqa: PLC0415 - as above

    settings = load_settings()
    revision, head = local.schema_state(settings)
    differences = local.schema_differences(settings) if revision == head else []
    Output(output).item({"revision": revision, "head": head, "differences": differences})
    if revision != head:
        raise CliFailure(f"the schema is at {revision}, this program needs {head}", remedy="run `lorary db upgrade`")
    if differences:
        raise CliFailure(f"the schema differs from the models in {len(differences)} places", remedy="this database was changed by hand")
