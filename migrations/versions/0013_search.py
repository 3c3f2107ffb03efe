"""Search: an inverted index of adapters' words and tags, filled from what is there, and indexes for the other filters.

Revises: 0012
Additive: a table and indexes.
"""

from __future__ import annotations

import re
import unicodedata

import sqlalchemy as sa
from alembic import op

from migrations.row_security import secure

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

BATCH = 500


def upgrade() -> None:
    op.create_table(
        "adapter_terms",
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("term", sa.LargeBinary(), nullable=False),
        sa.Column("adapter_id", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_terms_adapter_id_adapters"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_adapter_terms_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "term", "adapter_id", name=op.f("pk_adapter_terms")),
    )
    op.create_index(op.f("ix_adapter_terms_adapter_id"), "adapter_terms", ["adapter_id"])
    op.create_index("ix_adapters_by_base_model", "adapters", ["tenant_id", "base_model_id", "created_at", "id"])
    op.create_index("ix_adapter_versions_search", "adapter_versions", ["tenant_id", "status", "rank", "adapter_id"])
    secure("adapter_terms")
    _fill()


def _fill() -> None:
    adapters = sa.table("adapters", *(sa.column(name) for name in ("id", "tenant_id", "name", "description")), sa.column("tags", sa.JSON()))
    terms = sa.table("adapter_terms", *(sa.column(name) for name in ("tenant_id", "term", "adapter_id")))
    last = ""
    while True:
        rows = op.get_bind().execute(sa.select(adapters).where(adapters.c.id > last).order_by(adapters.c.id).limit(BATCH)).all()
        made = [{"tenant_id": row.tenant_id, "adapter_id": row.id, "term": term} for row in rows for term in _terms(row)]
        if made:
            op.get_bind().execute(sa.insert(terms), made)
        if len(rows) < BATCH:
            return
        last = rows[-1].id


def _terms(row: sa.Row) -> set[bytes]:
    """As registry/adapters/search.py made them when this was written."""
    text = " ".join((row.name, row.description, *row.tags))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found = {"w" + word[:64] for word in re.findall(r"[^\W_]+", folded)} | {"t" + tag for tag in row.tags}
    return {term.encode() for term in found}


def downgrade() -> None:
    op.drop_index("ix_adapter_versions_search", table_name="adapter_versions")
    op.drop_index("ix_adapters_by_base_model", table_name="adapters")
    op.drop_table("adapter_terms")
