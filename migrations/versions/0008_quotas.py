"""Quotas of tenants and the minute that their inference is in.

Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.row_security import secure

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

LIMITS = ("bytes", "adapters", "versions_per_day", "running_jobs", "requests_per_minute", "tokens_per_minute")


def upgrade() -> None:
    op.create_table(
        "quotas",
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in LIMITS),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_quotas_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_quotas")),
    )
    op.create_table(
        "rate_windows",
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("minute", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("requests >= 0", name=op.f("ck_rate_windows_requests")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_rate_windows_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_rate_windows")),
    )
    # The application makes the row and locks it (which takes the right to update some column); limits are the operator's.
    secure("quotas", app="SELECT, INSERT (tenant_id, updated_at), UPDATE (tenant_id)")
    secure("rate_windows")


def downgrade() -> None:
    op.drop_table("rate_windows")
    op.drop_table("quotas")
