"""Queries over quotas. The row of a tenant is the lock under which its counts change; its minute is one row too."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import BigInteger, and_, case, or_, select, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from registry.db import ReadSession, WriteSession
from registry.inserts import insert
from registry.quotas.models import Quota, RateWindow

ENDLESS = 2**62


class epoch_s(FunctionElement[int]):
    """Whole seconds since 1970 by the database's clock."""

    inherit_cache = True
    type = BigInteger()
    name = "epoch_s"


@compiles(epoch_s, "sqlite")
def _sqlite_epoch(_element: epoch_s, _compiler: Any, **_kw: Any) -> str:
    return "CAST(strftime('%s', 'now') AS INTEGER)"


@compiles(epoch_s, "postgresql")
def _postgresql_epoch(_element: epoch_s, _compiler: Any, **_kw: Any) -> str:
    return "CAST(floor(extract(epoch FROM clock_timestamp())) AS BIGINT)"


class Minute(NamedTuple):
    """What a minute has, and in how many seconds it ends."""

    minute: int
    requests: int
    tokens: int
    reset_s: int


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


# ---- the minute ----


def reserve(session: WriteSession, tenant_id: str, *, tokens: int, max_requests: int | None, max_tokens: int | None) -> Minute | None:
    """Count a request and its tokens in the current minute, or in none: then None. One statement.

    A minute that is over makes room for the current one. Where the clock says an older minute than the row (it was read
    before somebody else's was written), the row's counts.
    """
    wanted = insert(session, RateWindow).values(tenant_id=tenant_id, minute=epoch_s() // 60, requests=1, tokens=tokens)
    same = RateWindow.minute >= wanted.excluded.minute
    room = and_(
        RateWindow.requests + 1 <= (ENDLESS if max_requests is None else max_requests),
        RateWindow.tokens + tokens <= (ENDLESS if max_tokens is None else max_tokens),
    )
    counted = wanted.on_conflict_do_update(
        index_elements=[RateWindow.tenant_id],
        set_={
            "minute": case((same, RateWindow.minute), else_=wanted.excluded.minute),
            "requests": case((same, RateWindow.requests + 1), else_=1),
            "tokens": case((same, RateWindow.tokens + tokens), else_=tokens),
        },
        where=or_(~same, room),
    )
    row = session.execute(counted.returning(RateWindow.minute, RateWindow.requests, RateWindow.tokens, epoch_s())).one_or_none()
    return None if row is None else _minute(*row)


def settle(session: WriteSession, tenant_id: str, *, minute: int, difference: int) -> None:
    """Add to the tokens of a minute, while it is the row's."""
    one = and_(RateWindow.tenant_id == tenant_id, RateWindow.minute == minute)
    changed = update(RateWindow).where(one).values(tokens=RateWindow.tokens + difference)
    session.execute(changed, execution_options={"synchronize_session": False})


def minute_of(session: ReadSession, tenant_id: str) -> Minute:
    """The current minute; an empty one where the tenant has not asked for anything in it."""
    statement = select(RateWindow.minute, RateWindow.requests, RateWindow.tokens, epoch_s()).where(RateWindow.tenant_id == tenant_id)
    row = session.execute(statement).one_or_none()
    if row is None:
        now_s = session.scalar(select(epoch_s())) or 0
        return Minute(now_s // 60, 0, 0, 60 - now_s % 60)
    found = _minute(*row)
    return found if found.minute >= row[3] // 60 else Minute(row[3] // 60, 0, 0, found.reset_s)


def _minute(minute: int, requests: int, tokens: int, now_s: int) -> Minute:
    return Minute(minute, requests, tokens, 60 - now_s % 60)
