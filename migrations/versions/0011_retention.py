"""Retention: what versions need of blobs, what is deleted and until when it comes back, what the GC is about to remove.

Revises: 0010
Additive. Rows of before are filled by the GC itself, a page at a time: a version without references gets them from its
manifest before anything is swept, and a blob without `touched_at` counts from its creation.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.row_security import secure

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

STAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "blob_references",
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("owner_id", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_blob_references_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "sha256", "owner_id", name=op.f("pk_blob_references")),
    )
    op.create_index(op.f("ix_blob_references_owner_id"), "blob_references", ["owner_id"], unique=False)
    secure("blob_references")
    op.add_column("blobs", sa.Column("touched_at", STAMP, nullable=True))
    op.add_column("blobs", sa.Column("deleting_until", STAMP, nullable=True))
    op.add_column("blobs", sa.Column("deleting_by", sa.String(length=32), nullable=True))
    op.add_column("adapter_versions", sa.Column("deleted_at", STAMP, nullable=True))
    op.add_column("adapter_versions", sa.Column("deleted_aliases", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("adapter_versions", sa.Column("purged_at", STAMP, nullable=True))
    op.add_column("tenants", sa.Column("purge_requested_at", STAMP, nullable=True))


def downgrade() -> None:
    for table, columns in (
        ("tenants", ("purge_requested_at",)),
        ("adapter_versions", ("purged_at", "deleted_aliases", "deleted_at")),
        ("blobs", ("deleting_by", "deleting_until", "touched_at")),
    ):
        for column in columns:
            op.drop_column(table, column)
    op.drop_table("blob_references")
