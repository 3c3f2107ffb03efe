"""Usage: requests that are settled, and the sums of a day.

Revises: 0011
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.row_security import secure

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

SUMS = ("requests", "cancelled", "failed", "prompt_tokens", "completion_tokens")


def upgrade() -> None:
    op.create_table(
        "usage_records",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_usage_records_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_usage_records")),
    )
    op.create_index(op.f("ix_usage_records_settled_at"), "usage_records", ["settled_at"], unique=False)
    op.create_table(
        "usage_days",
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("is_adapter", sa.Boolean(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in SUMS),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_usage_days_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "day", "model", "key_id", name=op.f("pk_usage_days")),
    )
    for table in ("usage_records", "usage_days"):
        secure(table, app="SELECT")  # replicas' reports are the system's to write


def downgrade() -> None:
    op.drop_table("usage_days")
    op.drop_table("usage_records")
