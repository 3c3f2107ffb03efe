"""What Alembic runs for every command: the owner's connection, all our tables, one transaction a migration.

On PostgreSQL migrators queue, and a migration that would have to wait for others' locks gives up instead of making
everybody wait behind it. The owner's URL leads to the server itself, not to a pooler: the queue is a session's lock.
"""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, text

from registry.config import load_settings
from registry.db import Database, UtcDateTime
from registry.models import metadata

LOCK_ID = 0x6C6F7261  # "lora": one migrator at a time on PostgreSQL
QUEUE_TIMEOUT, LOCK_TIMEOUT, STATEMENT_TIMEOUT = "10min", "4s", "60s"


def render_item(kind: str, item: Any, _autogen: AutogenContext) -> str | Literal[False]:
    """Migrations name plain SQL types: they must not change when our classes do."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def queue_up(connection: Connection) -> None:
    """Held until the connection closes, however that comes about."""
    connection.execute(text(f"SET lock_timeout = '{QUEUE_TIMEOUT}'"))
    connection.execute(text("SELECT pg_advisory_lock(:id)"), {"id": LOCK_ID})
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))
    connection.commit()


def migrate(connection: Connection) -> None:
    on_postgresql = connection.dialect.name == "postgresql"
    if on_postgresql:
        queue_up(connection)
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=not on_postgresql,
        transactional_ddl=True,
        transaction_per_migration=on_postgresql,
        compare_server_default=True,
        render_item=render_item,
    )
    with context.begin_transaction():
        context.run_migrations()


url = context.config.attributes.get("url") or load_settings().resolved_owner_url
database = Database(url)
try:
    with database.engine.execution_options(lorary_write=True).connect() as writer:
        migrate(writer)
finally:
    database.close()
