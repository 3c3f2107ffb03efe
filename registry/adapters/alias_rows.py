"""Queries over aliases and their history. Rows, not objects of the ORM: a move is the registry's most frequent change, and
composing its statements would cost more than running them, so they are built once.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any, NamedTuple, cast
from uuid import uuid4

from sqlalchemy import Select, Table, bindparam, delete, func, insert, select, update

from registry.adapters.models import DELETED, AdapterVersion, Alias, AliasMove
from registry.db import ReadSession, WriteSession
from registry.pagination import decode_number

_aliases, _moves, _versions = (cast(Table, entity.__table__) for entity in (Alias, AliasMove, AdapterVersion))
_a, _m, _v = _aliases.c, _moves.c, _versions.c


class Pointing(NamedTuple):
    """An alias as it is now, with the version that it points at."""

    id: str
    name: str
    generation: int
    version_id: str
    number: int
    version_digest: str
    updated_at: dt.datetime
    updated_by: str


class Pointable(NamedTuple):
    """Of a version, what an alias needs to know."""

    id: str
    number: int
    version_digest: str
    status: str


def _pointing() -> Select[*tuple[Any, ...]]:
    columns = (_a.id, _a.name, _a.generation, _a.version_id, _v.number, _v.version_digest, _a.updated_at, _a.updated_by)
    mine = (_a.tenant_id == bindparam("tenant_id"), _a.adapter_id == bindparam("adapter_id"))
    return select(*columns).join_from(_aliases, _versions, _v.id == _a.version_id).where(*mine)


_OF_ADAPTER = _pointing().order_by(_a.name)
_OF_VERSION = _OF_ADAPTER.where(_a.version_id == bindparam("version_id"))
_NAMED = _pointing().where(_a.name == bindparam("name"))
_VERSION = select(_v.id, _v.number, _v.version_digest, _v.status).where(
    _v.tenant_id == bindparam("tenant_id"), _v.adapter_id == bindparam("adapter_id"), _v.number == bindparam("number"), _v.status != DELETED
)
_LAST_GENERATION = select(func.max(_m.generation)).where(
    _m.tenant_id == bindparam("tenant_id"), _m.adapter_id == bindparam("adapter_id"), _m.name == bindparam("name")
)
_INSERT = insert(_aliases).returning(_a.updated_at)
_MOVE = (
    update(_aliases)
    .where(_a.tenant_id == bindparam("of_tenant"), _a.id == bindparam("alias_id"))
    .values(version_id=bindparam("to"), generation=bindparam("now"), updated_by=bindparam("by"))
    .returning(_a.updated_at)
)
_REMOVE = delete(_aliases).where(_a.tenant_id == bindparam("tenant_id"), _a.id == bindparam("alias_id"))
_KEEP = insert(_moves)


def alias(session: ReadSession, tenant_id: str, adapter_id: str, name: str) -> Pointing | None:
    row = session.execute(_NAMED, {"tenant_id": tenant_id, "adapter_id": adapter_id, "name": name}).one_or_none()
    return None if row is None else Pointing(*row)


def aliases(session: ReadSession, tenant_id: str, adapter_id: str, *, version_id: str | None = None) -> list[Pointing]:
    """Of an adapter, or of one of its versions."""
    statement = _OF_ADAPTER if version_id is None else _OF_VERSION
    rows = session.execute(statement, {"tenant_id": tenant_id, "adapter_id": adapter_id, "version_id": version_id})
    return [Pointing(*row) for row in rows]


def version(session: ReadSession, tenant_id: str, adapter_id: str, number: int) -> Pointable | None:
    row = session.execute(_VERSION, {"tenant_id": tenant_id, "adapter_id": adapter_id, "number": number}).one_or_none()
    return None if row is None else Pointable(*row)


def last_generation(session: ReadSession, tenant_id: str, adapter_id: str, name: str) -> int:
    """0 where the alias never was. Goes on counting after a removal, so that an old ETag never matches again."""
    return session.scalar(_LAST_GENERATION, {"tenant_id": tenant_id, "adapter_id": adapter_id, "name": name}) or 0


def add(session: WriteSession, tenant_id: str, adapter_id: str, name: str, *, to: Pointable, generation: int, by: str) -> Pointing:
    session.flush()  # the version may be one that the ORM still holds back
    alias_id = uuid4().hex
    values = {"id": alias_id, "tenant_id": tenant_id, "adapter_id": adapter_id, "name": name}
    at = session.execute(_INSERT, {**values, "version_id": to.id, "generation": generation, "updated_by": by}).scalar_one()
    return Pointing(alias_id, name, generation, to.id, to.number, to.version_digest, at, by)


def move(session: WriteSession, tenant_id: str, alias: Pointing, *, to: Pointable, by: str) -> Pointing:
    """Under the adapter's lock, so that `alias` is what the row still says."""
    generation = alias.generation + 1
    values = {"of_tenant": tenant_id, "alias_id": alias.id, "to": to.id, "now": generation, "by": by}
    at = session.execute(_MOVE, values).scalar_one()
    return Pointing(alias.id, alias.name, generation, to.id, to.number, to.version_digest, at, by)


def remove(session: WriteSession, tenant_id: str, alias: Pointing) -> None:
    session.execute(_REMOVE, {"tenant_id": tenant_id, "alias_id": alias.id})


def keep_move(session: WriteSession, tenant_id: str, adapter_id: str, name: str, *, generation: int, number: int | None, by: str) -> None:
    """`number` None: it was removed."""
    values = {"id": uuid4().hex, "tenant_id": tenant_id, "adapter_id": adapter_id, "name": name}
    session.execute(_KEEP, {**values, "generation": generation, "number": number, "moved_by": by})


def moves_page(session: ReadSession, tenant_id: str, adapter_id: str, name: str, *, cursor: str | None, limit: int) -> Sequence[AliasMove]:
    statement = select(AliasMove).where(AliasMove.tenant_id == tenant_id, AliasMove.adapter_id == adapter_id, AliasMove.name == name)
    if cursor is not None:
        statement = statement.where(AliasMove.generation < decode_number(cursor))
    return session.scalars(statement.order_by(AliasMove.generation.desc()).limit(limit + 1)).all()
