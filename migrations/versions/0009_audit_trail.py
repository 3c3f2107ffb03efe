"""Audit events say where they came from, and are never changed or removed by anybody.

Revises: 0008
Additive: every new column is nullable. The owner of the tables alone can take the triggers away.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

SENTENCE = "audit events are never changed or removed"
CHANGES = ("UPDATE", "DELETE")


def upgrade() -> None:
    op.add_column("audit_events", sa.Column("address", sa.String(length=64), nullable=True))
    op.add_column("audit_events", sa.Column("user_agent", sa.String(length=256), nullable=True))
    op.add_column("audit_events", sa.Column("job_id", sa.String(length=32), nullable=True))
    op.create_index("ix_audit_events_by_key", "audit_events", ["tenant_id", "key_id", "created_at", "id"])
    op.create_index("ix_audit_events_by_resource", "audit_events", ["tenant_id", "resource_id", "created_at", "id"])
    if op.get_bind().dialect.name == "postgresql":
        _keep_on_postgresql()
    else:
        for change in CHANGES:
            op.execute(
                f"CREATE TRIGGER audit_events_no_{change.lower()} BEFORE {change} ON audit_events"
                f" BEGIN SELECT RAISE(ABORT, '{SENTENCE}'); END"
            )


def _keep_on_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION audit_events_are_kept() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION '{SENTENCE}' USING ERRCODE = 'insufficient_privilege'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_events_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events"
        " FOR EACH STATEMENT EXECUTE FUNCTION audit_events_are_kept()"
    )
    op.execute("REVOKE UPDATE, DELETE, TRUNCATE ON audit_events FROM lorary_system")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("GRANT UPDATE, DELETE ON audit_events TO lorary_system")
        op.execute("DROP TRIGGER audit_events_kept ON audit_events")
        op.execute("DROP FUNCTION audit_events_are_kept()")
    else:
        for change in CHANGES:
            op.execute(f"DROP TRIGGER audit_events_no_{change.lower()}")
    op.drop_index("ix_audit_events_by_resource", table_name="audit_events")
    op.drop_index("ix_audit_events_by_key", table_name="audit_events")
    for column in ("job_id", "user_agent", "address"):
        op.drop_column("audit_events", column)
