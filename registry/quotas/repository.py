"""Queries over quotas. The row of a tenant is the lock under which its counts change."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from registry.db import ReadSession, Table, WriteSession
from registry.quotas.models import Quota


def find(session: ReadSession, tenant_id: str) -> Quota | None:
    return session.scalar(select(Quota).where(Quota.tenant_id == tenant_id).execution_options(populate_existing=True))


def lock(session: WriteSession, tenant_id: str) -> Quota:
    """The row as it is now, held until the transaction ends; made where there was none."""
    statement = select(Quota).where(Quota.tenant_id == tenant_id).with_for_update().execution_options(populate_existing=True)
    found = session.scalar(statement)
    if found is not None:
        return found
    session.execute(insert(session, Quota).values(tenant_id=tenant_id).on_conflict_do_nothing())
    return session.scalars(statement).one()


def insert(session: WriteSession, table: type[Table]) -> Any:
    """An INSERT that knows ON CONFLICT, which both databases spell alike and SQLAlchemy has twice."""
    return (postgresql if session.get_bind().dialect.name == "postgresql" else sqlite).insert(table)
