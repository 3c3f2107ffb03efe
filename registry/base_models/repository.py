"""Queries over base models, which belong to nobody: every tenant sees them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import column, exists, select, table

from registry.base_models.models import BaseModelRevision
from registry.db import ReadSession
from registry.jobs.models import FINAL, Job
from registry.jobs.service import IMPORT_BASE_MODEL
from registry.pagination import after_cursor

# The adapters' domain lies above this one, so its class cannot be imported here; only names are compared.
_ADAPTERS = table("adapters", column("name"), column("deleted_at"))


def get(session: ReadSession, base_model_id: str) -> BaseModelRevision | None:
    return session.get(BaseModelRevision, base_model_id)


def by_name(session: ReadSession, name: str) -> BaseModelRevision | None:
    return session.scalar(select(BaseModelRevision).where(BaseModelRevision.name == name))


def by_digest(session: ReadSession, base_digest: str) -> BaseModelRevision | None:
    return session.scalar(select(BaseModelRevision).where(BaseModelRevision.base_digest == base_digest))


def everyone(session: ReadSession) -> Sequence[BaseModelRevision]:
    """All of them: a deployment serves a handful."""
    return session.scalars(select(BaseModelRevision).order_by(BaseModelRevision.name)).all()


def page(session: ReadSession, *, cursor: str | None, limit: int) -> Sequence[BaseModelRevision]:
    statement = after_cursor(select(BaseModelRevision), cursor, at=BaseModelRevision.created_at, row_id=BaseModelRevision.id, limit=limit)
    return session.scalars(statement).all()


def adapter_has_name(session: ReadSession, name: str) -> bool:
    """Whether any tenant's living adapter is called so."""
    taken = exists().where(_ADAPTERS.c.name == name, _ADAPTERS.c.deleted_at.is_(None))
    return bool(session.scalar(select(taken)))


def live_import(session: ReadSession, base_model_id: str) -> Job | None:
    """The job that will still decide about a pending base model, if there is one."""
    statement = select(Job).where(
        Job.kind == IMPORT_BASE_MODEL,
        Job.state.not_in(FINAL),
        Job.cancel_requested.is_(False),
        Job.payload["base_model_id"].as_string() == base_model_id,
    )
    return session.scalar(statement.limit(1))
