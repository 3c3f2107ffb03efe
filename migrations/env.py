"""What Alembic runs for every command: our engine, all our tables, one transaction a migration."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, text

from registry.config import load_settings
from registry.db import Database, UtcDateTime
from registry.models import metadata

LOCK_ID = 0x6C6F7261  # "lora": one migrator at a time on PostgreSQL


def render_item(kind: str, item: Any, _autogen: AutogenContext) -> str | Literal[False]:
    """Migrations name plain SQL types: they must not change when our classes do."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
        compare_server_default=True,
        render_item=render_item,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = '10s'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
        context.run_migrations()


url = context.config.attributes.get("url") or load_settings().resolved_database_url
database = Database(url)
try:
    with database.engine.execution_options(lorary_write=True).connect() as writer:
        migrate(writer)
finally:
    database.close()
