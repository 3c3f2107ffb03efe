"""${message}

Revises: ${down_revision or "nothing" | comma,n}
Additive first: a column appears nullable, is filled, is required in a later release. Both databases, one transaction.
A new table says whose it is: `secure(...)` or `share(...)` of migrations/row_security.py. See migrations/README.md.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
