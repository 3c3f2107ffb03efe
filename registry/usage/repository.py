"""Queries over usage. Reports are written across tenants, by the system; reading takes the tenant first."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Date, delete, func, literal, null, select, tuple_

from registry.db import ReadSession, UtcDateTime, WriteSession, utc_now
from registry.inserts import insert
from registry.tenants.models import Tenant
from registry.usage.models import UsageDay, UsageRecord
from registry.usage.schemas import Group

SUMS = (UsageDay.requests, UsageDay.cancelled, UsageDay.failed, UsageDay.prompt_tokens, UsageDay.completion_tokens)
FORGET_AT_ONCE = 2000


class DayKey(NamedTuple):
    tenant_id: str
    day: dt.date
    model: str
    key_id: str


# ---- settling ----


def add_records(session: WriteSession, requests: Mapping[str, str]) -> set[str]:
    """Of {request id: tenant id} those that were not settled before, which now are. In one order, so that reports do not deadlock."""
    rows = [{"request_id": request_id, "tenant_id": requests[request_id], "settled_at": utc_now()} for request_id in sorted(requests)]
    if not rows:
        return set()
    added = insert(session, UsageRecord).values(rows).on_conflict_do_nothing().returning(UsageRecord.request_id)
    return set(session.scalars(added))


def add_to_days(session: WriteSession, sums: Mapping[DayKey, tuple[bool, Sequence[int]]]) -> None:
    """{key: (is an adapter, the five sums)}, added to what there is."""
    for key in sorted(sums):
        is_adapter, values = sums[key]
        named = {column.key: value for column, value in zip(SUMS, values, strict=True)}
        wanted = insert(session, UsageDay).values(**key._asdict(), is_adapter=is_adapter, **named)
        added = {name: getattr(UsageDay, name) + wanted.excluded[name] for name in named}
        session.execute(wanted.on_conflict_do_update(index_elements=list(DayKey._fields), set_=added))


def forget_records(session: WriteSession, *, before: dt.datetime) -> None:
    """Some of those that are too old to come again; each report takes a few along."""
    old = select(UsageRecord.request_id).where(UsageRecord.settled_at < literal(before, UtcDateTime())).limit(FORGET_AT_ONCE)
    session.execute(delete(UsageRecord).where(UsageRecord.request_id.in_(old)), execution_options={"synchronize_session": False})


# ---- reading ----


@dataclass(frozen=True)
class Asked:
    """One question. `tenant_id` None: of every tenant, for admins alone."""

    tenant_id: str | None
    since: dt.date
    until: dt.date
    model: str | None
    key_id: str | None
    groups: frozenset[Group]


Position = tuple[dt.date | None, str, str, str]
"""Day, tenant id, model, key id of the last row of a page; "" for what is not a group."""


def rows(session: ReadSession, asked: Asked, *, after: Position | None, limit: int) -> Sequence[Any]:
    """(day, tenant, tenant id, model, is adapter, key id, sums ...), newest first, one more than `limit`."""
    by_model, by_key = Group.ADAPTER in asked.groups, Group.KEY in asked.groups
    dimensions = _dimensions(asked.groups)
    statement = select(
        UsageDay.day if Group.DAY in asked.groups else null().label("day"),
        Tenant.name.label("tenant"),
        UsageDay.tenant_id,
        UsageDay.model if by_model else literal("").label("model"),
        UsageDay.is_adapter if by_model else null().label("is_adapter"),
        UsageDay.key_id if by_key else literal("").label("key_id"),
        *(func.sum(column).label(column.key) for column in SUMS),
    ).join(Tenant, Tenant.id == UsageDay.tenant_id)
    statement = statement.where(*_conditions(asked)).group_by(*dimensions, Tenant.name, *([UsageDay.is_adapter] if by_model else []))
    if after is not None:
        statement = statement.where(tuple_(*dimensions) < tuple_(*_values(after, asked.groups)))
    return session.execute(statement.order_by(*(column.desc() for column in dimensions)).limit(limit + 1)).all()


def _dimensions(groups: Collection[Group]) -> list[Any]:
    chosen = (
        (UsageDay.day, Group.DAY in groups),
        (UsageDay.tenant_id, True),
        (UsageDay.model, Group.ADAPTER in groups),
        (UsageDay.key_id, Group.KEY in groups),
    )
    return [column for column, wanted in chosen if wanted]


def _values(after: Position, groups: Collection[Group]) -> Iterable[ColumnElement[Any]]:
    day, tenant_id, model, key_id = after
    if Group.DAY in groups:
        yield literal(day, Date())
    yield literal(tenant_id)
    if Group.ADAPTER in groups:
        yield literal(model)
    if Group.KEY in groups:
        yield literal(key_id)


def _conditions(asked: Asked) -> Iterable[ColumnElement[bool]]:
    yield UsageDay.day.between(asked.since, asked.until)
    if asked.tenant_id is not None:
        yield UsageDay.tenant_id == asked.tenant_id
    if asked.model is not None:
        yield UsageDay.model == asked.model
    if asked.key_id is not None:
        yield UsageDay.key_id == asked.key_id
