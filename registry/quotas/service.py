"""Rules of quotas: limits, and what is counted against them.

What a tenant uses is not kept in counters, which could drift: it is summed up in SQL, by meters that the domains above
give (`measure`), while the tenant's quota row is locked. So two pushes at the border come one after the other, and
what goes (a blob, an adapter) makes room by going. Tenants without a limit lock nothing; a limit therefore holds for
what begins after it was set.

Lock order: the quota row comes before every other row.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from registry.audit import service as audit
from registry.config import Settings
from registry.db import ReadSession, WriteSession, database_time
from registry.errors import QuotaExceeded, RateLimited, RegistryError
from registry.quotas import repository
from registry.quotas.models import UNLIMITED, Quota
from registry.quotas.schemas import Measure, MeasureOut, QuotaOut, QuotaPatch
from registry.tenants.auth import Subject
from registry.tenants.models import Tenant

Limits = Mapping[Measure, int | None]
"""None: no limit."""

Meter = Callable[[ReadSession, str], int]
_used: dict[Measure, list[Meter]] = {measure: [] for measure in Measure}
_reserved: dict[Measure, list[Meter]] = {measure: [] for measure in Measure}

NOUNS = {Measure.BYTES: "bytes", Measure.ADAPTERS: "adapters", Measure.VERSIONS: "new versions a day"}


def measure(what: Measure, meter: Meter, *, reserved: bool = False) -> None:
    """Count `meter(session, tenant_id)` as used, or as promised. For the layers above, once, where they are imported."""
    (_reserved if reserved else _used)[what].append(meter)


def defaults_of(settings: Settings) -> Limits:
    """The operator's limits of a tenant that has none of its own."""
    return {
        Measure.BYTES: settings.quota_bytes,
        Measure.ADAPTERS: settings.quota_adapters,
        Measure.VERSIONS: settings.quota_versions_per_day,
        Measure.JOBS: settings.max_running_jobs_per_tenant or None,
        Measure.REQUESTS: settings.quota_requests_per_minute,
        Measure.TOKENS: settings.quota_tokens_per_minute,
    }


def effective(own: int | None, default: int | None) -> int | None:
    """What holds of a tenant's own limit, as its column has it, and the operator's. None: no limit."""
    limit = default if own is None else own
    return None if limit == UNLIMITED else limit


def limits_of(session: ReadSession, tenant_id: str, *, defaults: Limits) -> Limits:
    """One statement, no lock."""
    return _limits(repository.find(session, tenant_id), defaults)


def _limits(row: Quota | None, defaults: Limits) -> Limits:
    return {what: effective(None if row is None else getattr(row, what), default) for what, default in defaults.items()}


# ---- spending ----


@dataclass(frozen=True)
class Allowance:
    """What one transaction may add. Where anything is limited, the tenant's quota row is locked until it ends."""

    tenant_id: str
    limits: Limits

    def spend(self, session: WriteSession, what: Measure, amount: int) -> None:
        """Call before the rows that count are added. Raises QuotaExceeded, or RateLimited for what is counted by the day."""
        self._require(session, what, amount, counted=0)

    def spent(self, session: WriteSession, what: Measure, amount: int) -> None:
        """`spend`, called when the rows were added: where only that told that they are new."""
        self._require(session, what, amount, counted=amount)

    def _require(self, session: WriteSession, what: Measure, amount: int, *, counted: int) -> None:
        limit = self.limits.get(what)
        if limit is None:
            return
        used = count(session, self.tenant_id, what) - counted
        if used + amount > limit:
            raise exceeded(session, what, limit=limit, used=used, amount=amount)


def allowance(session: WriteSession, tenant_id: str, *measures: Measure, defaults: Limits) -> Allowance:
    """What may be added of `measures`. Before any other row of the tenant is locked."""
    limits = limits_of(session, tenant_id, defaults=defaults)
    if all(limits[what] is None for what in measures):
        return Allowance(tenant_id, {})
    return Allowance(tenant_id, _limits(repository.lock(session, tenant_id), defaults))


def count(session: ReadSession, tenant_id: str, what: Measure) -> int:
    """Used and promised together."""
    return sum(meter(session, tenant_id) for meter in (*_used[what], *_reserved[what]))


def require_room(session: ReadSession, tenant_id: str, what: Measure, amount: int, *, defaults: Limits) -> int | None:
    """A look ahead without a lock, before bytes move: how much may be added now, None for no limit. Raises like `spend`."""
    limit = limits_of(session, tenant_id, defaults=defaults)[what]
    if limit is None:
        return None
    used = count(session, tenant_id, what)
    if amount and used + amount > limit:
        raise exceeded(session, what, limit=limit, used=used, amount=amount)
    return max(0, limit - used)


def exceeded(session: ReadSession, what: Measure, *, limit: int, used: int, amount: int) -> RegistryError:
    sentence = f"this tenant may have {limit} {NOUNS[what]} and has {used}; {amount} more would be too many"
    details: dict[str, Any] = {"field": what.value, "value": used + amount, "code": "quota_exceeded"}
    if what is Measure.VERSIONS:
        return RateLimited(sentence, **details, retry_after_s=_until_tomorrow(session), remedy="push again tomorrow, by UTC")
    return QuotaExceeded(sentence, **details, remedy="delete what is no longer needed, or ask the operator for a larger quota")


def day_start(session: ReadSession) -> dt.datetime:
    """The beginning of this day of UTC, by the database's clock."""
    return database_time(session).replace(hour=0, minute=0, second=0, microsecond=0)


def _until_tomorrow(session: ReadSession) -> int:
    now = database_time(session)
    tomorrow = now.replace(hour=0, minute=0, second=0, microsecond=0) + dt.timedelta(days=1)
    return max(1, round((tomorrow - now).total_seconds()))


# ---- showing and changing ----


def describe(session: ReadSession, tenant: str, tenant_id: str, *, defaults: Limits) -> QuotaOut:
    """Limits and use. Counts are of this moment: nothing is locked."""
    row = repository.find(session, tenant_id)
    limits = _limits(row, defaults)
    shown = {
        what.value: MeasureOut(
            limit=limit,
            source="default" if row is None or getattr(row, what) is None else "tenant",
            used=sum(meter(session, tenant_id) for meter in _used[what]),
            reserved=sum(meter(session, tenant_id) for meter in _reserved[what]),
        )
        for what, limit in limits.items()
    }
    return QuotaOut.model_validate({"tenant": tenant, **shown})


def change(session: WriteSession, subject: Subject, tenant: Tenant, patch: QuotaPatch) -> None:
    """Set the limits that the patch names. What a tenant has beyond a smaller limit stays; it may only not add."""
    row = repository.lock(session, tenant.id)
    wanted = {name: UNLIMITED if limit == "unlimited" else limit for name, limit in patch.model_dump(exclude_unset=True).items()}
    before = {name: getattr(row, name) for name in wanted}
    if before == wanted:
        return
    for name, limit in wanted.items():
        setattr(row, name, limit)
    session.flush()
    said = [{name: "unlimited" if limit == UNLIMITED else limit for name, limit in values.items()} for values in (before, wanted)]
    audit.record(session, subject, "quota.changed", "quota", tenant.id, before=said[0], after=said[1], tenant_id=tenant.id)
