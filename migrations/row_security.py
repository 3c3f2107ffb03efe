"""Row-level security for migrations: who may do what with a table. Does nothing on SQLite.

Every table gets one of two calls in the migration that makes it:

    secure("adapters")          it has a tenant_id: the application sees and writes the rows of its transaction's tenant
    share("base_models")        it belongs to nobody: the application gets the named privileges on all of it

`tests/registry/postgres/test_contract.py` fails for a table that got neither.
"""

from __future__ import annotations

from alembic import op

APP, SYSTEM = "lorary_app", "lorary_system"
DML = "SELECT, INSERT, UPDATE, DELETE"

# Unset and empty are the same, and equal to no tenant: a transaction that did not say for whom it works sees nothing.
CURRENT_TENANT = "NULLIF(current_setting('app.tenant_id', true), '')"


def make_roles() -> None:
    """The two roles, without login, and their right to the schema. `lorary db init` lets accounts log in as them."""
    for role in (APP, SYSTEM):
        _run(
            f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN CREATE ROLE {role} NOLOGIN; END IF;"
            " EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
        )
        _run(f"DO $$ BEGIN EXECUTE format('GRANT USAGE ON SCHEMA %I TO {role}', current_schema()); END $$")
    _run(f"ALTER DEFAULT PRIVILEGES GRANT {DML} ON TABLES TO {SYSTEM}")  # of tables that this owner makes from now on
    _run(f"GRANT {DML} ON ALL TABLES IN SCHEMA public TO {SYSTEM}")
    _run(f"GRANT SELECT ON alembic_version TO {APP}")


def forget_roles() -> None:
    """Undo `make_roles` in this database. The roles stay: another database of the server may use them."""
    _run(f"ALTER DEFAULT PRIVILEGES REVOKE {DML} ON TABLES FROM {SYSTEM}")
    for role in (APP, SYSTEM):
        _run(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}")
        _run(f"DO $$ BEGIN EXECUTE format('REVOKE USAGE ON SCHEMA %I FROM {role}', current_schema()); END $$")


def secure(table: str, *, column: str = "tenant_id", app: str = DML) -> None:
    """Rows belong to the tenant in `column`. `app` are the application's privileges: less where rows never change.

    FORCE, so that owning the table is no way around: what the owner may do stands in a policy like everything else.
    """
    own = f"{column} = {CURRENT_TENANT}"
    _run(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    _run(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    _run(f"CREATE POLICY tenant ON {table} TO {APP} USING ({own}) WITH CHECK ({own})")
    _run(f"CREATE POLICY every_tenant ON {table} TO {SYSTEM}, CURRENT_USER USING (true) WITH CHECK (true)")
    _run(f"GRANT {app} ON {table} TO {APP}")


def unsecure(table: str) -> None:
    """For a downgrade that keeps the table; a table that is dropped takes its policies along."""
    _run(f"DROP POLICY tenant ON {table}")
    _run(f"DROP POLICY every_tenant ON {table}")
    _run(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
    _run(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    _run(f"REVOKE ALL ON {table} FROM {APP}")


def share(table: str, *, app: str = "SELECT") -> None:
    """A table without an owner. Empty `app`: the application does not touch it."""
    if app:
        _run(f"GRANT {app} ON {table} TO {APP}")


def _run(statement: str) -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(statement)
