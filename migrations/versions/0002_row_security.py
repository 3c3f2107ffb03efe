"""Row-level security on every table of tenants (PostgreSQL).

Revises: 0001
Additive first: a column appears nullable, is filled, is required in a later release. Both databases, one transaction.
"""

from __future__ import annotations

from migrations.row_security import forget_roles, make_roles, secure, share, unsecure

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OWNED = ("api_keys", "adapters", "adapter_versions", "forms", "aliases", "blobs", "jobs")
APPENDED = ("alias_moves", "audit_events")


def upgrade() -> None:
    make_roles()
    for table in OWNED:
        secure(table)
    for table in APPENDED:
        secure(table, app="SELECT, INSERT")
    secure("replica_residents", app="SELECT")
    secure("tenants", column="id", app="SELECT")
    share("base_models")
    share("replicas")


def downgrade() -> None:
    for table in ("tenants", "replica_residents", *APPENDED, *OWNED):
        unsecure(table)
    forget_roles()
