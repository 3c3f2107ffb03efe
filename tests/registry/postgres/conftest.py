"""Installations on a real PostgreSQL, seen by each of the three roles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.postgresql import PostgreSQL


@pytest.fixture
def installation(postgresql_server: PostgreSQL) -> Iterator[str]:
    """The name of a database with roles and tables, and nothing in them."""
    with postgresql_server.installation() as name:
        yield name


@pytest.fixture
def as_app(postgresql_server: PostgreSQL, installation: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the application's role: raw SQL that goes around every repository."""
    with postgresql_server.connect(installation, account="lorary_app") as connection:
        yield connection


@pytest.fixture
def as_system(postgresql_server: PostgreSQL, installation: str) -> Iterator[psycopg.Connection[Any]]:
    with postgresql_server.connect(installation, account="lorary_system", autocommit=True) as connection:
        yield connection
