"""A real PostgreSQL for a test session: installed from PyPI (pgserver), with the three roles."""

from __future__ import annotations

import itertools
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import migrations
from registry.config import Settings
from registry.models import metadata
from registry.roles import ensure_roles

ACCOUNTS = ("lorary_app", "lorary_system", "lorary_owner")


class PostgreSQL:
    """One server over a socket in `folder`. Our three accounts need their passwords, the superuser does not.

    `durable` as PostgreSQL comes; else without waiting for the disk, for tests.
    """

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        import pgserver

        self._server = pgserver.get_server(folder)
        self._numbers = itertools.count()
        self._clean: list[str] = []
        self._host = self._server.get_uri().partition("host=")[2]
        self._configure(folder, durable=durable)
        self.execute("CREATE ROLE lorary_owner LOGIN CREATEROLE PASSWORD 'lorary_owner-secret'")

    def _configure(self, folder: Path, *, durable: bool) -> None:
        hba = folder / "pg_hba.conf"
        hba.write_text(f"local all {','.join(ACCOUNTS)} scram-sha-256\n" + hba.read_text())
        for setting in () if durable else ("fsync = off", "synchronous_commit = off", "full_page_writes = off"):
            self.execute(f"ALTER SYSTEM SET {setting}")
        self.execute("SELECT pg_reload_conf()")

    def url(self, database: str, account: str = "postgres") -> str:
        login = account if account == "postgres" else f"{account}:{account}-secret"
        return f"postgresql+psycopg://{login}@/{database}?host={self._host}"

    def urls(self, database: str) -> dict[str, Any]:
        """The three URLs, as settings."""
        names = ("database_url", "database_system_url", "database_owner_url")
        return {name: self.url(database, account) for name, account in zip(names, ACCOUNTS, strict=True)}

    def dial(self) -> socket.socket:
        """A connection to the server's socket, for a proxy before it."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{self._host}/.s.PGSQL.5432")
        return connection

    def execute(self, statement: str, *, database: str = "postgres", account: str = "postgres") -> list[tuple[Any, ...]]:
        """As the superuser, each statement its own transaction, unless an account is named."""
        with self.connect(database, account=account, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    @contextmanager
    def connect(self, database: str, *, account: str = "postgres", autocommit: bool = False) -> Iterator[psycopg.Connection[Any]]:
        url = self.url(database, account).replace("+psycopg", "")
        with psycopg.connect(url, autocommit=autocommit, prepare_threshold=None) as connection:
            yield connection

    @contextmanager
    def empty_database(self) -> Iterator[str]:
        """Owned by lorary_owner, without tables."""
        name = self._create()
        try:
            yield name
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def installation(self) -> Iterator[str]:
        """With roles and tables and nothing in them, as `lorary db init` leaves it; emptied and used again afterwards."""
        name = self._clean.pop() if self._clean else self._install()
        try:
            yield name
        finally:
            self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            # as a replica would: the triggers that keep the audit log look away
            self.execute(f"SET session_replication_role = replica; TRUNCATE {', '.join(metadata.tables)}", database=name)
            self._clean.append(name)

    def _install(self) -> str:
        name = self._create()
        ensure_roles(Settings(**self.urls(name)))
        migrations.upgrade(self.url(name, "lorary_owner"))
        return name

    def _create(self) -> str:
        name = f"lorary_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} OWNER lorary_owner")
        return name

    def refuse_connections(self, database: str) -> None:
        """The database goes away: nobody gets in, and who is in is thrown out."""
        self.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")

    def accept_connections(self, database: str) -> None:
        self.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")

    def stop(self) -> None:
        self._server.cleanup()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """Not under pytest's own folder: the next session closes that to other users, and root's server runs as one."""
    with tempfile.TemporaryDirectory(prefix="lorary-pg-", ignore_cleanup_errors=True) as folder:
        server = PostgreSQL(Path(folder))
        yield server
        server.stop()
