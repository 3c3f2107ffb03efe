"""Versions are found by the day on which they were made: a quota of them a day counts no others.

Revises: 0014
Additive: an index.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_adapter_versions_made", "adapter_versions", ["tenant_id", "created_at"])


def downgrade() -> None:
    op.drop_index("ix_adapter_versions_made", table_name="adapter_versions")
