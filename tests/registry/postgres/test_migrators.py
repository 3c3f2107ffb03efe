"""Making and migrating an installation on PostgreSQL: there and back, twice at once, in front of locks, with its accounts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy.exc import OperationalError

import migrations
from registry.bootstrap import init_database
from registry.config import Settings
from registry.models import metadata
from registry.roles import ensure_roles
from tests.postgresql import PostgreSQL


@pytest.fixture
def empty(postgresql_server: PostgreSQL) -> Iterator[str]:
    with postgresql_server.empty_database() as name:
        yield name


@pytest.fixture
def settings(postgresql_server: PostgreSQL, empty: str, tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path, secret_key=SecretStr("s" * 40), **postgresql_server.urls(empty))


def tables(server: PostgreSQL, database: str) -> set[str]:
    return {row[0] for row in server.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", database=database)}


def test_there_and_back(postgresql_server: PostgreSQL, settings: Settings, empty: str) -> None:
    ensure_roles(settings)
    url = settings.resolved_owner_url
    migrations.upgrade(url)
    assert migrations.check(url) == []
    assert tables(postgresql_server, empty) == {*metadata.tables, "alembic_version"}
    migrations.downgrade(url, "base")
    assert tables(postgresql_server, empty) == {"alembic_version"}
    migrations.upgrade(url)
    assert migrations.revision_of(url) == migrations.head_revision()


def test_one_head() -> None:
    migrations.head_revision()  # raises where there are two


def lorary(settings: Settings, *command: str, state_dir: Path) -> subprocess.Popen[str]:
    """A command of its own process, as two machines run it: they share the database, not the state directory and its lock."""
    urls = {name: str(getattr(settings, name)) for name in ("database_url", "database_system_url", "database_owner_url")}
    env = {f"LORARY_{name.upper()}": url for name, url in urls.items()} | {
        "LORARY_STATE_DIR": str(state_dir),
        "LORARY_SECRET_KEY": "s" * 40,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "registry.cli", *command],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs(*processes: subprocess.Popen[str]) -> list[str]:
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def test_two_migrators_queue(settings: Settings, tmp_path: Path) -> None:
    ensure_roles(settings)
    outputs(*(lorary(settings, "db", "upgrade", state_dir=tmp_path / str(number)) for number in range(2)))
    assert migrations.check(settings.resolved_owner_url) == []


@pytest.mark.full
def test_two_installers_make_one_admin_key(settings: Settings, tmp_path: Path) -> None:
    said = outputs(*(lorary(settings, "db", "init", "--output", "json", state_dir=tmp_path / str(number)) for number in range(2)))
    assert sorted("lry_" in text for text in said) == [False, True]
    assert "-secret" not in "".join(said)
    assert init_database(settings).admin_token is None


@pytest.mark.full
def test_a_migration_does_not_wait_for_others_locks(postgresql_server: PostgreSQL, settings: Settings, empty: str) -> None:
    """Behind a migration that waits, every reader of the table would wait too."""
    ensure_roles(settings)
    migrations.upgrade(settings.resolved_owner_url, "0001")
    with postgresql_server.connect(empty) as other:
        other.execute("SELECT * FROM adapters")
        with pytest.raises(OperationalError, match="lock timeout"):
            migrations.upgrade(settings.resolved_owner_url)
        assert migrations.revision_of(settings.resolved_owner_url) == "0001", "all of a migration or none of it"
    migrations.upgrade(settings.resolved_owner_url)


def test_accounts_need_their_passwords_and_keep_them_out_of_logs(
    postgresql_server: PostgreSQL, settings: Settings, empty: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made = init_database(settings)
    assert made.admin_token is not None
    wrong = postgresql_server.url(empty, "lorary_app").replace("lorary_app-secret", "guessed").replace("+psycopg", "")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)
    shown = "".join(capfd.readouterr()) + repr(settings)
    assert "-secret" not in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"database_system_url": ""}, "three different users"),
        ({"database_owner_url": "app"}, "three different users"),
        ({"database_url": "superuser"}, "superuser or has BYPASSRLS"),
    ],
)
def test_accounts_that_would_undo_the_separation_are_refused(
    postgresql_server: PostgreSQL, settings: Settings, empty: str, change: dict[str, Any], says: str
) -> None:
    urls = {"app": settings.database_url, "superuser": postgresql_server.url(empty), "": ""}
    with pytest.raises(ValueError, match=says):
        ensure_roles(settings.model_copy(update={name: urls[value] for name, value in change.items()}))


def test_accounts_of_other_names_become_members(postgresql_server: PostgreSQL, settings: Settings, empty: str) -> None:
    """As a managed server has them, or two installations beside each other."""
    ensure_roles(settings)
    migrations.upgrade(settings.resolved_owner_url)
    named = settings.database_url.replace("lorary_app:", "blue_app:")
    ensure_roles(settings.model_copy(update={"database_url": named}))
    member = postgresql_server.execute(
        "SELECT pg_has_role('blue_app', 'lorary_app', 'member'), rolcanlogin FROM pg_roles WHERE rolname = 'blue_app'"
    )
    assert member == [(True, True)]
    with postgresql_server.connect(empty, account="blue_app") as connection:
        assert connection.execute("SELECT count(*) FROM adapters").fetchone() == (0,)
    postgresql_server.execute("REVOKE lorary_app FROM blue_app")
    postgresql_server.execute("DROP ROLE blue_app")


def test_one_url_alone_works_without_the_separation(postgresql_server: PostgreSQL, empty: str, tmp_path: Path) -> None:
    """For a trial: the owner does everything, as the policy for it says."""
    alone = Settings(state_dir=tmp_path, secret_key=SecretStr("s" * 40), database_url=postgresql_server.url(empty, "lorary_owner"))
    assert init_database(alone).admin_token is not None
    assert init_database(alone).admin_token is None
