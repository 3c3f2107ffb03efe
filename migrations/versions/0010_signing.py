"""Signing keys, policies, and which key vouches for which version.

Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.row_security import secure

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

POLICIES = "('off', 'verify_if_present', 'require')"


def upgrade() -> None:
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("curve", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_by", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_signing_keys_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signing_keys")),
        sa.UniqueConstraint("tenant_id", "fingerprint", name=op.f("uq_signing_keys_tenant_id_fingerprint")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_signing_keys_tenant_id_name")),
    )
    op.create_table(
        "signing_policies",
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("policy", sa.String(length=20), nullable=False),
        sa.Column("floor", sa.String(length=20), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_by", sa.String(length=64), nullable=False),
        sa.CheckConstraint(f"policy IN {POLICIES}", name=op.f("ck_signing_policies_policy")),
        sa.CheckConstraint(f"floor IN {POLICIES}", name=op.f("ck_signing_policies_floor")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_signing_policies_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_signing_policies")),
    )
    op.create_table(
        "version_signatures",
        sa.Column("version_id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("verified_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["signing_keys.id"], name=op.f("fk_version_signatures_key_id_signing_keys")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_version_signatures_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_versions.id"], name=op.f("fk_version_signatures_version_id_adapter_versions")),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_version_signatures")),
    )
    op.create_index(op.f("ix_version_signatures_key_id"), "version_signatures", ["key_id"], unique=False)
    for table in ("signing_keys", "signing_policies", "version_signatures"):
        secure(table, app="SELECT, INSERT, UPDATE")


def downgrade() -> None:
    for table in ("version_signatures", "signing_policies", "signing_keys"):
        op.drop_table(table)
