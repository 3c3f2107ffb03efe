"""Rules of usage: whose report is believed, what it settles, and what may be asked of the sums.

A report carries the grants themselves. Only the registry can have signed one and only its addressee was ever sent it, so
nothing has to be remembered of a request while it runs: who it was for, and what was reserved, stands in its grant.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from registry.config import Settings
from registry.db import ReadSession, WriteSession, database_time
from registry.errors import BadRequest, Forbidden
from registry.pagination import decode_cursor, encode_cursor
from registry.quotas import rates
from registry.serving import repository as serving
from registry.serving import service as serving_service
from registry.serving.grants import GrantSigner
from registry.tenants.auth import Subject
from registry.usage import repository
from registry.usage.repository import Asked, DayKey, Position
from registry.usage.schemas import Group, UsagePage, UsageRow
from registry.wire import FinishedRequest, GrantClaims, UsageReply, UsageReport

log = structlog.get_logger(__name__)

DEFAULT_DAYS = 30
MAX_DAYS = 366
MAX_CSV_ROWS = 50_000
EPOCH = dt.date(1970, 1, 1)


# ---- settling ----


@dataclass(frozen=True)
class Reported:
    """One finished request with what its grant says."""

    claims: GrantClaims
    request: FinishedRequest


def read_grants(report: UsageReport, *, signer: GrantSigner, settings: Settings) -> list[Reported]:
    """Those whose grant is ours and not too old, each request once. Signatures take time: call it without a transaction."""
    found: dict[str, Reported] = {}
    for request in report.requests:
        try:
            claims = signer.read(request.grant, leeway_s=settings.usage_settle_s)
        except Forbidden as refused:
            log.warning("usage.refused", reason=refused.detail)
            continue
        if request.age_s <= settings.usage_settle_s and claims.iat - settings.grant_leeway_s <= time.time():
            found.setdefault(claims.jti, Reported(claims, request))
    return list(found.values())


def settle(
    session: WriteSession, subject: Subject, reported: Sequence[Reported], *, replica_id: str, num_reported: int, settings: Settings
) -> UsageReply:
    """Count what was not counted before, and give back or take what reservations were wrong by. Raises NotFound: register again."""
    serving_service.own_replica(session, subject, replica_id)
    believed = _addressed_to(session, reported, replica_id=replica_id)
    added = repository.add_records(session, {one.claims.jti: one.claims.tenant for one in believed})
    fresh = [one for one in believed if one.claims.jti in added]
    now = database_time(session)
    _add_to_days(session, fresh, now=now)
    _settle_rates(session, fresh)
    repository.forget_records(session, before=now - dt.timedelta(seconds=2 * settings.usage_settle_s))
    return UsageReply(num_counted=len(fresh), num_known=len(believed) - len(fresh), num_refused=num_reported - len(believed))


def _addressed_to(session: ReadSession, reported: Sequence[Reported], *, replica_id: str) -> list[Reported]:
    """Those granted to this replica, also under an id that the registry has forgotten; of tenants that it knows."""
    others = {one.claims.aud for one in reported} - {replica_id}
    known = serving.known_replicas(session, others) if others else set()
    return [one for one in reported if one.claims.aud not in known]


def _add_to_days(session: WriteSession, reported: Sequence[Reported], *, now: dt.datetime) -> None:
    """A request belongs to the day of UTC, by the database's clock, on which it ended."""
    sums: dict[DayKey, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    adapters: dict[DayKey, bool] = {}
    for one in reported:
        claims, request = one.claims, one.request
        day = (now - dt.timedelta(seconds=request.age_s)).date()
        key = DayKey(claims.tenant, day, claims.model.partition("@")[0], claims.key_id)
        adapters[key] = claims.form_digest is not None
        outcome = (1, request.outcome == "cancelled", request.outcome == "failed")
        used = (*map(int, outcome), request.num_prompt_tokens, request.num_completion_tokens)
        sums[key] = [total + more for total, more in zip(sums[key], used, strict=True)]
    repository.add_to_days(session, {key: (adapters[key], values) for key, values in sums.items()})


def _settle_rates(session: WriteSession, reported: Sequence[Reported]) -> None:
    differences: dict[tuple[str, int], int] = defaultdict(int)
    for one in reported:
        used = one.request.num_prompt_tokens + one.request.num_completion_tokens
        if one.claims.minute:
            differences[one.claims.tenant, one.claims.minute] += used - one.claims.reserved_tokens
    for (tenant_id, minute), difference in sorted(differences.items()):
        rates.settle(session, tenant_id, minute=minute, difference=difference)


# ---- asking ----


def question(
    session: ReadSession,
    tenant_id: str | None,
    *,
    since: dt.date | None,
    until: dt.date | None,
    adapter: str | None,
    key_id: str | None,
    groups: Sequence[Group],
) -> Asked:
    """Raises BadRequest for a range that ends before it begins or is longer than a year. Days are the database's."""
    until = until or database_time(session).date()
    since = since or dt.date.fromordinal(max(1, until.toordinal() - DEFAULT_DAYS + 1))
    if not 0 <= (until - since).days < MAX_DAYS:
        raise BadRequest(
            f"since {since} to until {until} is no range of 1 to {MAX_DAYS} days",
            field="since",
            value=since,
            remedy=f"ask for at most {MAX_DAYS} days, the earlier one first",
        )
    return Asked(tenant_id, since, until, adapter, key_id, frozenset(groups))


def page(session: ReadSession, asked: Asked, *, cursor: str | None, limit: int) -> UsagePage:
    found = repository.rows(session, asked, after=None if cursor is None else _position(cursor), limit=limit)
    shown = found[:limit]
    following = _cursor(shown[-1]) if len(found) > limit else None
    return UsagePage(since=asked.since, until=asked.until, items=[_show(row) for row in shown], next_cursor=following)


def everything(session: ReadSession, asked: Asked) -> list[UsageRow]:
    """The whole range. Raises BadRequest where that is too much for one answer."""
    found = repository.rows(session, asked, after=None, limit=MAX_CSV_ROWS)
    if len(found) > MAX_CSV_ROWS:
        raise BadRequest(
            f"the range has more than {MAX_CSV_ROWS} rows",
            field="since",
            value=asked.since,
            remedy="ask for fewer days or fewer groups, or follow the pages of JSON",
        )
    return [_show(row) for row in found]


def _show(row: Any) -> UsageRow:
    values = dict(row._mapping)
    model, is_adapter = values.pop("model") or None, values.pop("is_adapter")
    values.pop("tenant_id")
    values["key_id"] = values["key_id"] or None
    return UsageRow(adapter=model if is_adapter else None, base_model=None if is_adapter else model, **values)


def _cursor(row: Any) -> str:
    day = row.day or EPOCH
    names = (row.tenant_id, row.model, row.key_id)
    return encode_cursor(dt.datetime.combine(day, dt.time(), dt.UTC), "\n".join(names))


def _position(cursor: str) -> Position:
    moment, names = decode_cursor(cursor)
    parts = names.split("\n")
    if len(parts) != 3 or "\0" in names:
        raise BadRequest(
            "cursor is not one of ours; start again without it", field="cursor", value=cursor, remedy="pass next_cursor, unchanged"
        )
    return moment.date(), parts[0], parts[1], parts[2]
