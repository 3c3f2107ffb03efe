"""What a model reference means now: the one query on the path of every inference request.

The statements are built once: composing a join of five tables costs SQLAlchemy more than SQLite takes to run it.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Executable, Select, and_, bindparam, literal, null, select, union_all

from registry.adapters.models import READY, Adapter, AdapterVersion, Alias, Form
from registry.base_models.models import BaseModelRevision
from registry.db import ReadSession
from registry.quotas.models import Quota


class Served(NamedTuple):
    """What a model reference means now. `name` to `rank` are None for a base model.

    The last two are the tenant's own limits, as its quota row has them: read here, they cost no statement of their own.
    """

    base_model_id: str
    base_model: str
    created_at: dt.datetime
    name: str | None
    version_digest: str | None
    form_digest: str | None
    rank: int | None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def find_version(session: ReadSession, tenant_id: str, *, name: str, number: int) -> Served | None:
    """Version `number` of the tenant's adapter, if it is ready. One statement."""
    return _first(session, _BY_NUMBER, tenant_id=tenant_id, name=name, number=number)


def find_alias(session: ReadSession, tenant_id: str, *, name: str, alias: str) -> Served | None:
    """What the alias of the tenant's adapter points at, if that is ready. One statement."""
    return _first(session, _BY_ALIAS, tenant_id=tenant_id, name=name, alias=alias)


def find_bare(session: ReadSession, tenant_id: str, *, name: str) -> Served | None:
    """A base model, or the `default` of the tenant's adapter; no adapter may be named like a base model. One statement."""
    return _first(session, _BARE, tenant_id=tenant_id, name=name)


def list_served(session: ReadSession, tenant_id: str) -> list[Served]:
    """Every base model, and the tenant's adapters that a bare name reaches."""
    rows = session.execute(_LISTED, {"tenant_id": tenant_id}).all()
    return sorted((Served(*row) for row in rows), key=lambda served: (served.name is not None, served.name or served.base_model))


def _first(session: ReadSession, statement: Executable, **values: Any) -> Served | None:
    found = session.execute(statement, values).first()
    return None if found is None else Served(*found)


def _ready_adapters() -> Select[*tuple[Any, ...]]:
    base, version = BaseModelRevision, AdapterVersion
    ready = (Adapter.deleted_at.is_(None), version.status == READY, base.status == READY)
    return (
        select(base.id, base.name, Adapter.created_at, Adapter.name, version.version_digest, Form.form_digest, version.rank)
        .select_from(Adapter)
        .join(version, version.adapter_id == Adapter.id)
        .join(Form, and_(Form.version_id == version.id, Form.kind == "raw"))
        .join(base, base.id == version.base_model_id)
        .where(Adapter.tenant_id == bindparam("tenant_id"), *ready)
    )


def _ready_base_models() -> Select[*tuple[Any, ...]]:
    base = BaseModelRevision
    return select(base.id, base.name, base.created_at, null(), null(), null(), null()).where(base.status == READY)


def _called(alias: ColumnElement[str]) -> ColumnElement[bool]:
    return and_(Alias.adapter_id == Adapter.id, Alias.name == alias, Alias.version_id == AdapterVersion.id)


def _with_limits(statement: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
    columns = (Quota.requests_per_minute, Quota.tokens_per_minute)
    own = (select(column).where(Quota.tenant_id == bindparam("tenant_id")).scalar_subquery() for column in columns)
    return statement.add_columns(*own)


_NAMED = _with_limits(_ready_adapters()).where(Adapter.name == bindparam("name"))
_DEFAULT = literal("default")
_BY_NUMBER = _NAMED.where(AdapterVersion.number == bindparam("number"))
_BY_ALIAS = _NAMED.join(Alias, _called(bindparam("alias")))
_BASE = _with_limits(_ready_base_models()).where(BaseModelRevision.name == bindparam("name"))
_BARE = union_all(_BASE, _NAMED.join(Alias, _called(_DEFAULT)))
_LISTED = union_all(_ready_base_models(), _ready_adapters().join(Alias, _called(_DEFAULT)))
