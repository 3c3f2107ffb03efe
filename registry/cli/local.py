"""What a command does to the installation itself, without HTTP: its schema, its keys, its stored bytes.

Whoever holds the state directory and the database holds the installation; no API key is asked for here. This module
brings the database stack, which takes a second to import, so commands import it only when they need it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from alembic.util.exc import CommandError
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

import migrations
from registry.audit.service import record
from registry.bootstrap import init_database
from registry.cli import blob_check
from registry.cli.blob_check import BlobReport
from registry.cli.failure import CliFailure
from registry.cli.output import Output
from registry.config import FirstKeys, Settings
from registry.db import Database, open_database
from registry.resealing import SecretsReport, examine_secrets, reseal
from registry.sealing import make_sealer
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import ADMIN, KeyHasher
from registry.tenants.service import issue_key

WAIT_S = 1.0


def initialise(settings: Settings, *, keys: FirstKeys | None = None) -> tuple[Settings, str | None]:
    """Secret key, schema and first admin key, where they are missing. The key's token is told this once."""
    with reporting(settings):
        try:
            made = init_database(settings, keys=keys)
        except ValueError as error:
            raise CliFailure(str(error)) from error
    return made.settings, made.admin_token


def wait_for_server(settings: Settings, *, timeout_s: float) -> None:
    """Until the owner's URL answers: a database that starts at the same time as we do."""

    def answers() -> bool:
        migrations.revision_of(settings.resolved_owner_url)
        return True

    _wait(settings, answers, timeout_s=timeout_s)


def wait_for_schema(settings: Settings, *, timeout_s: float) -> str:
    """The revision, once it is one that this program can serve. Asks as the application's account, which needs no other."""
    revision: str | None = None

    def look() -> bool:
        nonlocal revision
        revision = migrations.revision_of(settings.resolved_database_url)
        return migrations.can_serve(revision)

    _wait(settings, look, timeout_s=timeout_s)
    assert revision is not None, "can_serve says no to a schema that is not there"
    return revision


def _wait(settings: Settings, look: Callable[[], bool], *, timeout_s: float) -> None:
    """Ask every second; a database that is away means "not yet". Raises CliFailure when the time is over, with the last reason."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            with reporting(settings):
                if look():
                    return
            failure = CliFailure(
                f"the schema is not at {migrations.head_revision()} after {timeout_s:g} s", remedy="run `lorary db upgrade`"
            )
        except CliFailure as away:
            failure = away
        if time.monotonic() >= until:
            raise failure
        time.sleep(WAIT_S)


def issue_admin_key(settings: Settings, *, name: str) -> str:
    """The token of a new admin key: for the supervisor, and for whoever lost the first one."""
    hasher = KeyHasher(settings.secret_key.get_secret_value())
    with reporting(settings), _opened(settings) as database, database.system_write() as session:
        _key, token = issue_key(
            session, subject=SYSTEM, tenant_id=None, name=name, scopes={ADMIN}, expires_at=None, hasher=hasher, record=record
        )
    return token


def upgrade(settings: Settings, revision: str) -> str | None:
    with reporting(settings):
        migrations.upgrade(settings.resolved_owner_url, revision)
        return migrations.revision_of(settings.resolved_owner_url)


def downgrade(settings: Settings, revision: str) -> str | None:
    with reporting(settings):
        migrations.downgrade(settings.resolved_owner_url, revision)
        return migrations.revision_of(settings.resolved_owner_url)


def backup(settings: Settings, file: Path) -> int:
    """Copy SQLite's database while others use it; returns its bytes. All of the file or none of it, and only for its owner."""
    source = make_url(settings.resolved_database_url)
    if source.get_backend_name() != "sqlite":
        raise CliFailure("the database is PostgreSQL", remedy="pg_dump copies it: see registry/OPERATIONS.md")
    if not source.database or not Path(source.database).exists():
        raise CliFailure(f"there is no database at {source.database}", remedy="run `lorary db init`, or set LORARY_STATE_DIR")
    if file.exists():
        raise CliFailure(f"{file} is there already", remedy="name a file that is not there")
    temporary = file.with_name(f".{file.name}.part")
    with reporting(settings):
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600)
        with closing(sqlite3.connect(source.database)) as database, closing(sqlite3.connect(temporary)) as copy:
            database.backup(copy)
        temporary.rename(file)
        return file.stat().st_size


def schema_state(settings: Settings) -> tuple[str | None, str]:
    """(the revision that the database is at, the one that this program needs)."""
    with reporting(settings):
        return migrations.revision_of(settings.resolved_owner_url), migrations.head_revision()


def schema_differences(settings: Settings) -> list[str]:
    with reporting(settings):
        return migrations.check(settings.resolved_owner_url)


def check_blobs(settings: Settings, *, sample: int | None, output: Output) -> BlobReport:
    """Look at a random `sample` of the recorded blobs, or at all of them with a bar of progress."""
    with reporting(settings), _opened(settings) as database:
        if sample is not None:
            with output.waiting("checking blobs"):
                return blob_check.check_blobs(database, settings, sample=sample, advance=lambda _count: None)
        with output.progress("checking blobs", total_bytes=blob_check.count_bytes(database)) as advance:
            return blob_check.check_blobs(database, settings, sample=None, advance=advance)


def check_secrets(settings: Settings) -> SecretsReport:
    with reporting(settings), _opened(settings) as database, database.system_read() as session:
        return examine_secrets(session, make_sealer(settings))


def reseal_secrets(settings: Settings) -> SecretsReport:
    """Every secret that opens, sealed anew under LORARY_SECRET_KEY; what does not open stays as it is and is reported."""
    with reporting(settings), _opened(settings) as database, database.system_write() as session:
        return reseal(session, make_sealer(settings))


@contextmanager
def reporting(settings: Settings) -> Iterator[None]:
    """A database or disk that does not answer becomes one sentence. The URL's password is not in it."""
    try:
        yield
    except (SQLAlchemyError, psycopg.Error) as error:  # accounts are made through the driver itself
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise CliFailure(
            f"the database does not answer: {reason}",
            remedy="check LORARY_DATABASE_URL, or run `lorary db init`",
            state_dir=settings.state_dir,
        ) from error
    except CommandError as error:
        raise CliFailure(f"the migration cannot run: {error}", remedy="`lorary db check` shows where the schema is") from error
    except OSError as error:
        raise CliFailure(f"{error.filename or settings.state_dir}: {error.strerror}", remedy="check LORARY_STATE_DIR") from error


@contextmanager
def _opened(settings: Settings) -> Iterator[Database]:
    database = open_database(settings)
    try:
        yield database
    finally:
        database.close()
