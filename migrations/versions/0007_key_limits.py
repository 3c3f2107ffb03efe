"""Keys limited to adapters by prefix, their successors, and which adapter a job is about.

Revises: 0006
Additive: every new column is nullable, and null is what held before.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("adapter_prefixes", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("api_keys", sa.Column("successor_id", sa.String(length=32), nullable=True))
    op.add_column("jobs", sa.Column("adapter", sa.String(length=63), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "adapter")
    op.drop_column("api_keys", "successor_id")
    op.drop_column("api_keys", "adapter_prefixes")
