"""What must hold of every table and of every place that crosses tenants, also of those that are not written yet."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sqlalchemy import PrimaryKeyConstraint, UniqueConstraint

from registry.models import metadata
from tests.postgresql import PostgreSQL

ROOT = Path(__file__).resolve().parents[3]

# Who may open a unit of work across tenants, and why. Everything else works for one tenant a transaction.
ALLOWED = {
    "registry/db.py": "defines it",
    "registry/tenants/auth.py": "key lookup, before the tenant is known; requests of operators and replicas",
    "registry/tenants/last_used.py": "the last use of many tenants' keys in one write",
    "registry/audit/service.py": "refusals, also of keys that open no tenant",
    "registry/bootstrap.py": "the first admin key",
    "registry/cli/local.py": "operators on the machine itself",
    "registry/readiness.py": "whether that role's connection answers",
    "registry/state_metrics.py": "counts of jobs, hints, deliveries and replicas, for the operator's Prometheus",
    "registry/cli/blob_check.py": "operators on the machine itself: every tenant's bytes",
    "workers/shell.py": "claiming whichever tenant's job goes next",
    "workers/sweep.py": "jobs whose worker is gone",
    "workers/outbox.py": "the relay",
    "workers/schedule.py": "starting a collection, which is nobody's tenant's job",
    "workers/webhooks.py": "claiming whichever tenant's delivery goes next",
    "registry/jobs/events.py": "news of watched jobs, one poller a process; who may watch which job is settled before, inside the tenant",
}
WAYS = {"system_read", "system_write", "reach_system", "SYSTEM_REACH", "system_engine"}

# Tables without a tenant that the application may read. Whoever adds one here says why no tenant owns its rows.
SHARED = {
    "base_models": "operators register them for everybody",
    "replicas": "operators run them for everybody",
    "alembic_version": "readiness compares it with the program",
}


def _names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
    }


def test_who_crosses_tenants_is_written_down() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for house in ("registry", "workers")
        for path in (ROOT / house).rglob("*.py")
        if WAYS & _names(path)
    }
    assert found - ALLOWED.keys() == set(), "crosses tenants: work inside one (reaching_tenant), or argue it in ALLOWED"
    existing = {path for path in ALLOWED if (ROOT / path).exists()}
    assert existing - found == set(), "no longer crosses tenants: take it out of ALLOWED"


def test_the_product_opens_databases_in_one_way() -> None:
    """`open_database` knows the roles; a bare Database(url) would see nothing, or work as one role for everything."""
    allowed = {"registry/db.py"}
    for house in ("registry", "workers"):
        for path in (ROOT / house).rglob("*.py"):
            calls = [
                node.lineno
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Database"
            ]
            where = path.relative_to(ROOT).as_posix()
            assert not calls or where in allowed, f"{where}:{calls}: use open_database(settings)"


@pytest.fixture(scope="module")
def policies(postgresql_server: PostgreSQL) -> dict[str, set[str]]:
    """{table: names of its policies}, of tables where row-level security is on and forced."""
    with postgresql_server.installation() as name:
        rows = postgresql_server.execute(
            "SELECT c.relname, p.polname FROM pg_class c LEFT JOIN pg_policy p ON p.polrelid = c.oid"
            " WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND c.relrowsecurity AND c.relforcerowsecurity",
            database=name,
        )
    found: dict[str, set[str]] = {}
    for table, policy in rows:
        found.setdefault(table, set()).add(policy)
    return found


def test_every_table_with_a_tenant_has_its_policies(policies: dict[str, set[str]]) -> None:
    owned = {name for name, table in metadata.tables.items() if "tenant_id" in table.columns} | {"tenants"}
    forgotten = sorted(owned - policies.keys())
    assert not forgotten, f"{forgotten}: call migrations.row_security.secure() in the migration that makes the table"
    for table in owned:
        assert policies[table] >= {"tenant", "every_tenant"}, table


def test_every_other_table_is_shared_on_purpose(policies: dict[str, set[str]], postgresql_server: PostgreSQL) -> None:
    with postgresql_server.installation() as name:
        granted = {
            row[0]
            for row in postgresql_server.execute(
                "SELECT DISTINCT table_name FROM information_schema.role_table_grants WHERE grantee = 'lorary_app'", database=name
            )
        }
    assert granted - policies.keys() - SHARED.keys() == set(), "the application reaches rows without a policy: secure() it, or argue SHARED"
    assert SHARED.keys() <= granted, "listed as shared, yet not granted"


def test_unique_keys_tell_nothing_about_other_tenants() -> None:
    """They are checked past the policies. Whoever can guess a value could ask whether another tenant has it.

    So a key of an owned table leads with the tenant or holds an id, 128 random bits that nobody guesses.
    """
    for name, table in metadata.tables.items():
        if "tenant_id" not in table.columns:
            continue
        keys = [constraint for constraint in table.constraints if isinstance(constraint, UniqueConstraint | PrimaryKeyConstraint)]
        columns = [[column.name for column in key.columns] for key in keys]
        columns += [[column.name for column in index.columns] for index in table.indexes if index.unique]
        for key in columns:
            assert key[0] == "tenant_id" or any(column == "id" or column.endswith("_id") for column in key), f"{name}: {key}"
