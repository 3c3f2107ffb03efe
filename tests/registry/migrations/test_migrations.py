"""The schema's history: there and back again, equal to the models, one transaction a migration."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import OperationalError

import migrations
from registry.db import Database
from registry.models import metadata


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'lorary.sqlite3'}"


def tables(url: str) -> set[str]:
    engine = create_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_upgrade_downgrade_upgrade(url: str) -> None:
    migrations.upgrade(url)
    assert tables(url) == {*metadata.tables, "alembic_version"}
    assert migrations.revision_of(url) == migrations.head_revision()
    migrations.downgrade(url, "base")
    assert tables(url) == {"alembic_version"}
    assert migrations.revision_of(url) is None
    migrations.upgrade(url)
    assert migrations.check(url) == []


def test_upgrade_of_an_upgraded_database_changes_nothing(url: str) -> None:
    migrations.upgrade(url)
    with Database(url).write() as session:
        session.execute(text("INSERT INTO tenants (id, name, created_at) VALUES ('1', 'acme', '2026-01-01 00:00:00.000000')"))
    migrations.upgrade(url)
    with Database(url).read() as session:
        assert session.scalar(text("SELECT name FROM tenants")) == "acme"


def test_check_names_what_differs(url: str) -> None:
    migrations.upgrade(url)
    with Database(url).write() as session:
        session.execute(text("ALTER TABLE tenants ADD COLUMN surprise TEXT"))
        session.execute(text("DROP INDEX ix_audit_events_created_at_id"))
    found = " ".join(migrations.check(url))
    assert "surprise" in found
    assert "ix_audit_events_created_at_id" in found


def test_migrated_schema_equals_the_models_to_the_letter(url: str, tmp_path: Path) -> None:
    """`alembic check` does not compare CHECK constraints or the names of keys; SQLite's own text of the schema does."""
    migrations.upgrade(url)
    made = Database(f"sqlite:///{tmp_path / 'made.sqlite3'}")
    metadata.create_all(made.engine)
    made.close()
    assert _constraints(url) == _constraints(f"sqlite:///{tmp_path / 'made.sqlite3'}")


def _constraints(url: str) -> dict[str, object]:
    engine = create_engine(url)
    look = inspect(engine)
    found = {
        table: (
            sorted((check["name"], check["sqltext"]) for check in look.get_check_constraints(table)),
            sorted((unique["name"], tuple(unique["column_names"])) for unique in look.get_unique_constraints(table)),
            sorted((foreign["name"], foreign["referred_table"], str(foreign["options"])) for foreign in look.get_foreign_keys(table)),
            sorted((index["name"], tuple(index["column_names"])) for index in look.get_indexes(table)),
            look.get_pk_constraint(table)["name"],
            {column["name"]: (str(column["type"]), column["nullable"]) for column in look.get_columns(table)},
        )
        for table in metadata.tables
    }
    engine.dispose()
    return found


def test_a_migration_that_fails_leaves_nothing_behind(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "migrations"
    shutil.copytree(migrations._FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    head = migrations.head_revision()
    (folder / "versions" / "9999_broken.py").write_text(
        f'from alembic import op\nrevision = "9999"\ndown_revision = "{head}"\n'
        'def upgrade():\n    op.execute("CREATE TABLE half (id TEXT)")\n    op.execute("CREATE TABLE tenants (id TEXT)")\n'
        "def downgrade():\n    pass\n"
    )
    migrations.upgrade(url)
    monkeypatch.setattr(migrations, "_FOLDER", folder)
    with pytest.raises(OperationalError, match="already exists"):
        migrations.upgrade(url)
    assert "half" not in tables(url)
    assert migrations.revision_of(url) == head


def test_names_fit_into_postgresql(url: str) -> None:
    """63 characters; longer ones are cut silently, and then two may be one."""
    migrations.upgrade(url)
    engine = create_engine(url)
    names = [row[0] for row in engine.connect().execute(text("SELECT name FROM sqlite_master"))]
    engine.dispose()
    assert max(map(len, names)) <= 63
    for table in metadata.tables.values():
        for constraint in table.constraints:
            assert constraint.name is None or len(str(constraint.name)) <= 63


def test_the_shipped_ini_serves_the_alembic_command(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(migrations._FOLDER / "alembic.ini"), "upgrade", "head"],
        env={**os.environ, "LORARY_DATABASE_URL": f"sqlite:///{tmp_path / 'x.sqlite3'}"},
        cwd=migrations._FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "x.sqlite3") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (migrations.head_revision(),)
    connection.close()
