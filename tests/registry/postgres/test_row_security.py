"""Row-level security by raw SQL: what the application's role can do to another tenant when every repository is bypassed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

from tests.postgresql import PostgreSQL

Connection = psycopg.Connection[Any]

ROWS = """
INSERT INTO tenants (id, name, created_at) VALUES ('acme', 'acme', now()), ('rival', 'rival', now());
INSERT INTO base_models (id, name, status, source, upstream_names, created_at) VALUES ('base', 'tiny', 'ready', '{}', '[]', now());
INSERT INTO api_keys (id, tenant_id, name, token_hmac, scopes, created_at) VALUES
  ('k-acme', 'acme', 'k', 'h', '[]', now()), ('k-rival', 'rival', 'k', 'h', '[]', now()), ('k-root', NULL, 'k', 'h', '["admin"]', now());
INSERT INTO adapters (id, tenant_id, name, base_model_id, description, tags, created_at, updated_at) VALUES
  ('a-acme', 'acme', 'pirate', 'base', '', '[]', now(), now()), ('a-rival', 'rival', 'secret', 'base', '', '[]', now(), now());
INSERT INTO blobs (tenant_id, sha256, size, created_at) VALUES ('acme', 'aa', 1, now()), ('rival', 'bb', 1, now());
INSERT INTO audit_events (id, tenant_id, key_id, action, outcome, resource_type, resource_id, created_at) VALUES
  ('e-acme', 'acme', 'k', 'a.b', 'done', 't', 'r', now()), ('e-rival', 'rival', 'k', 'a.b', 'done', 't', 'r', now()),
  ('e-root', NULL, 'k', 'a.b', 'done', 't', 'r', now());
INSERT INTO replicas (id, key_id, url, base_model_id, max_rank, num_pages, page_bytes, state, sequence, num_queued, num_running,
  num_free_pages, registered_at) VALUES ('r', 'k-root', 'http://r', 'base', 8, 1, 1, 'ready', 1, 0, 0, 1, now());
INSERT INTO replica_residents (replica_id, tenant_id, form_digest, tier) VALUES ('r', 'acme', 'f', 'pool'), ('r', 'rival', 'g', 'pool');
"""
SEEN = {
    "tenants": "id",
    "api_keys": "tenant_id",
    "adapters": "tenant_id",
    "blobs": "tenant_id",
    "audit_events": "tenant_id",
    "replica_residents": "tenant_id",
}


@pytest.fixture
def acme(as_app: Connection, as_system: Connection) -> Iterator[Connection]:
    """The application inside a transaction of acme, with two tenants' rows in the tables."""
    as_system.execute(ROWS)
    become(as_app, "acme")
    yield as_app
    as_app.rollback()


def become(connection: Connection, tenant: str) -> None:
    connection.execute("SELECT set_config('app.tenant_id', %s, true)", (tenant,))


def seen(connection: Connection, table: str) -> set[str]:
    return {row[0] for row in connection.execute(f"SELECT {SEEN[table]} FROM {table}")}


def test_a_tenant_sees_its_own_rows_alone(acme: Connection) -> None:
    assert {table: seen(acme, table) for table in SEEN} == {table: {"acme"} for table in SEEN}
    acme.rollback()
    become(acme, "rival")
    assert {table: seen(acme, table) for table in SEEN} == {table: {"rival"} for table in SEEN}


@pytest.mark.parametrize("tenant", ["", "nobody", "acme' OR 'a'='a", "NULL", "%"])
def test_nobody_sees_nothing(acme: Connection, tenant: str) -> None:
    acme.rollback()
    become(acme, tenant)
    assert {table: seen(acme, table) for table in SEEN} == {table: set() for table in SEEN}


def test_a_connection_that_says_nothing_sees_nothing(acme: Connection) -> None:
    acme.rollback()
    assert {table: seen(acme, table) for table in SEEN} == {table: set() for table in SEEN}


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO blobs (tenant_id, sha256, size, created_at) VALUES ('rival', 'cc', 1, now())",
        "INSERT INTO adapters (id, tenant_id, name, base_model_id, description, tags, created_at, updated_at)"
        " VALUES ('x', 'rival', 'x', 'base', '', '[]', now(), now())",
        "INSERT INTO api_keys (id, tenant_id, name, token_hmac, scopes, created_at) VALUES ('x', NULL, 'x', 'h', '[\"admin\"]', now())",
        "INSERT INTO jobs (id, tenant_id, subject_id, kind, payload, state, attempt, max_attempts, fence, available_at, cancel_requested,"
        " created_at, updated_at) VALUES ('x', NULL, 's', 'k', '{}', 'queued', 0, 1, 0, now(), false, now(), now())",
        "UPDATE adapters SET tenant_id = 'rival'",
        "UPDATE api_keys SET tenant_id = NULL",
        "INSERT INTO blobs (tenant_id, sha256, size, created_at) VALUES ('rival', 'bb', 1, now())"
        " ON CONFLICT (tenant_id, sha256) DO UPDATE SET size = 99",
    ],
)
def test_rows_cannot_be_put_into_another_tenant_or_into_none(acme: Connection, statement: str) -> None:
    with pytest.raises(errors.InsufficientPrivilege, match="row-level security"):
        acme.execute(statement)


def test_another_tenants_rows_cannot_be_changed_or_removed(acme: Connection, as_system: Connection) -> None:
    assert acme.execute("UPDATE adapters SET description = 'mine' WHERE id = 'a-rival'").rowcount == 0
    assert acme.execute("UPDATE adapters SET description = 'mine'").rowcount == 1
    assert acme.execute("DELETE FROM blobs WHERE tenant_id = 'rival'").rowcount == 0
    assert acme.execute("DELETE FROM blobs").rowcount == 1
    assert acme.execute("SELECT id FROM adapters WHERE id = 'a-rival' FOR UPDATE").fetchall() == []
    acme.commit()
    assert as_system.execute("SELECT description FROM adapters WHERE id = 'a-rival'").fetchone() == ("",)
    assert as_system.execute("SELECT tenant_id FROM blobs").fetchall() == [("rival",)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_events SET action = 'x.y'",
        "DELETE FROM audit_events",
        "DELETE FROM alias_moves",
        "INSERT INTO tenants (id, name, created_at) VALUES ('x', 'x', now())",
        "UPDATE tenants SET deleted_at = NULL",
        "UPDATE base_models SET location = '/etc'",
        "INSERT INTO replica_residents (replica_id, tenant_id, form_digest, tier) VALUES ('r', 'acme', 'x', 'pool')",
        "DELETE FROM replicas",
        "TRUNCATE blobs",
        "ALTER TABLE blobs DISABLE ROW LEVEL SECURITY",
        "DROP POLICY tenant ON blobs",
        "SET ROLE lorary_system",
        "SET ROLE lorary_owner",
        "SET SESSION AUTHORIZATION lorary_system",
        "CREATE TABLE mine (id text)",
        "UPDATE alembic_version SET version_num = '0000'",
    ],
)
def test_what_the_application_may_not_do_at_all(acme: Connection, statement: str) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        acme.execute(statement)


def test_a_query_that_demands_no_row_security_is_refused(acme: Connection) -> None:
    """row_security = off asks for all rows or an error; it must be the error."""
    acme.execute("SET LOCAL row_security = off")
    with pytest.raises(errors.InsufficientPrivilege, match="row-level security"):
        acme.execute("SELECT * FROM adapters")


def test_the_system_crosses_tenants_but_is_no_owner(acme: Connection, as_system: Connection) -> None:
    assert seen(as_system, "audit_events") == {"acme", "rival", None}
    with pytest.raises(errors.InsufficientPrivilege):
        as_system.execute("ALTER TABLE blobs DISABLE ROW LEVEL SECURITY")


def test_no_role_of_ours_can_pass_by_the_policies(postgresql_server: PostgreSQL, installation: str) -> None:
    found = postgresql_server.execute(
        "SELECT rolname FROM pg_roles WHERE rolname IN ('lorary_app', 'lorary_system') AND (rolsuper OR rolbypassrls OR rolcreaterole)"
    )
    assert found == []
    owned = postgresql_server.execute("SELECT tableowner FROM pg_tables WHERE schemaname = 'public' GROUP BY 1", database=installation)
    assert owned == [("lorary_owner",)]


def test_two_tenants_interleaved_on_one_connection(acme: Connection) -> None:
    """What pgbouncer in transaction mode does: every transaction may follow another tenant's on the same connection."""
    acme.rollback()
    for tenant in ["acme", "rival", "acme", "rival", "rival"]:
        become(acme, tenant)
        assert seen(acme, "adapters") == {tenant}
        acme.execute("SAVEPOINT inner_one")
        become(acme, "somebody")
        assert seen(acme, "adapters") == set()
        acme.execute("ROLLBACK TO SAVEPOINT inner_one")
        assert seen(acme, "adapters") == {tenant}
        (acme.commit if tenant == "acme" else acme.rollback)()
        assert seen(acme, "adapters") == set(), "the transaction that says nothing inherits nothing"
        acme.rollback()


def test_a_failed_transaction_leaves_no_tenant_behind(acme: Connection) -> None:
    with pytest.raises(errors.DivisionByZero):
        acme.execute("SELECT 1/0")
    acme.rollback()
    assert seen(acme, "adapters") == set()
