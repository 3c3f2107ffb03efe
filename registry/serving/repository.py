"""Queries of serving. The ones on the path of a request are single statements over unique indexes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    String,
    and_,
    bindparam,
    case,
    delete,
    exists,
    false,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from registry.adapters.models import READY, Adapter, AdapterVersion, Form
from registry.base_models.models import BaseModelRevision
from registry.db import ReadSession, UtcDateTime, WriteSession, database_time, utc_now
from registry.pagination import after_cursor
from registry.serving import models
from registry.serving.models import Replica, ReplicaResident
from registry.tenants.models import Tenant
from registry.wire import Heartbeat, ReplicaRegistration, Resident

NEAREST_FIRST = {"pool": 0, "host": 1, "disk": 2}


class from_now(FunctionElement[dt.datetime]):
    """The database's clock plus an interval in words, such as '-15.0 seconds', which both databases read alike."""

    inherit_cache = True
    type = UtcDateTime()
    name = "from_now"


@compiles(from_now, "sqlite")
def _sqlite_from_now(element: from_now, compiler: Any, **kw: Any) -> str:
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {compiler.process(element.clauses, **kw)}) || '000')"


@compiles(from_now, "postgresql")
def _postgresql_from_now(element: from_now, compiler: Any, **kw: Any) -> str:
    return f"(clock_timestamp() + CAST({compiler.process(element.clauses, **kw)} AS INTERVAL))"


class Address(NamedTuple):
    """Where to send a request."""

    replica_id: str
    url: str


# ---- base models and forms ----


def find_base_model(session: ReadSession, *, base_digest: str) -> BaseModelRevision | None:
    return session.scalar(select(BaseModelRevision).where(BaseModelRevision.base_digest == base_digest, BaseModelRevision.status == READY))


class LiveForm(NamedTuple):
    """A form that may be pulled now."""

    version_digest: str
    base_digest: str
    manifest: dict[str, Any]


def find_live_form(session: ReadSession, tenant_id: str, *, version_digest: str, form_digest: str) -> LiveForm | None:
    """The form, while some adapter of a living tenant still has it in a ready version."""
    statement = (
        _forms_alive(AdapterVersion.version_digest, BaseModelRevision.base_digest, Form.manifest)
        .join(BaseModelRevision, BaseModelRevision.id == AdapterVersion.base_model_id)
        .where(Form.tenant_id == tenant_id, Form.form_digest == form_digest, AdapterVersion.version_digest == version_digest)
    )
    found = session.execute(statement.limit(1)).first()
    return None if found is None else LiveForm(*found)


def _forms_alive(*columns: Any) -> Select[*tuple[Any, ...]]:
    return (
        select(*columns)
        .select_from(Form)
        .join(AdapterVersion, and_(AdapterVersion.id == Form.version_id, AdapterVersion.status == READY))
        .join(Adapter, and_(Adapter.id == AdapterVersion.adapter_id, Adapter.deleted_at.is_(None)))
        .join(Tenant, and_(Tenant.id == Form.tenant_id, Tenant.deleted_at.is_(None)))
    )


# ---- replicas ----


def is_live(ttl: ColumnElement[str]) -> ColumnElement[bool]:
    """By the database's clock: `ready`, and heard of within `ttl` (an interval in words, negative)."""
    return and_(Replica.state == models.READY, Replica.heartbeat_at > from_now(ttl))


def _ago(seconds: float) -> str:
    return f"-{seconds} seconds"


def choose_replica(
    session: ReadSession,
    tenant_id: str,
    *,
    base_model_id: str,
    form_digest: str | None,
    rank: int | None,
    ttl_s: float,
    tried: Collection[str],
) -> Address | None:
    """The live replica nearest to having the adapter, then with the shortest queue. One statement."""
    values = {"base_model_id": base_model_id, "tenant_id": tenant_id, "form_digest": form_digest, "rank": rank or 0}
    found = session.execute(_CHOICE, {**values, "ttl": _ago(ttl_s), "tried": list(tried)}).first()
    return None if found is None else Address(*found)


def _choice() -> Select[str, str]:
    """Built once, like the statements of `names`. Nothing is resident under a NULL form digest: the base model's case."""
    resident = ReplicaResident
    held = and_(resident.tenant_id == bindparam("tenant_id"), resident.form_digest == bindparam("form_digest", type_=String))
    eligible = (Replica.max_rank >= bindparam("rank"), Replica.id.not_in(bindparam("tried", expanding=True)))
    distance = case(NEAREST_FIRST, value=resident.tier, else_=len(NEAREST_FIRST))
    return (
        select(Replica.id, Replica.url)
        .outerjoin(resident, and_(resident.replica_id == Replica.id, held))
        .where(Replica.base_model_id == bindparam("base_model_id"), is_live(bindparam("ttl", type_=String)), *eligible)
        # Random last, so that equals share what arrives between two heartbeats.
        .order_by(distance, Replica.num_queued, Replica.num_running, func.random())
        .limit(1)
    )


_CHOICE = _choice()


def find_address(session: ReadSession, replica_id: str) -> Address | None:
    """Where a replica listens, whoever registered it: for operators."""
    url = session.scalar(select(Replica.url).where(Replica.id == replica_id))
    return None if url is None else Address(replica_id, url)


def get_replica(session: ReadSession, replica_id: str, *, key_id: str) -> Replica | None:
    """Only by the key that registered it."""
    return session.scalar(select(Replica).where(Replica.id == replica_id, Replica.key_id == key_id))


def known_replicas(session: ReadSession, replica_ids: Collection[str]) -> set[str]:
    """Of these ids, those that some replica has."""
    return set(session.scalars(select(Replica.id).where(Replica.id.in_(replica_ids))))


def register(session: WriteSession, registration: ReplicaRegistration, *, key_id: str, base_model_id: str) -> Replica:
    """The row of (key, url), made or started anew: a process that registers holds nothing and has reported nothing."""
    url = registration.url.rstrip("/")
    replica = session.scalar(select(Replica).where(Replica.key_id == key_id, Replica.url == url))
    if replica is None:
        replica = Replica(key_id=key_id, url=url)
        session.add(replica)
    replica.base_model_id = base_model_id
    replica.max_rank = registration.max_rank
    replica.num_pages = registration.num_pages
    replica.page_bytes = registration.page_bytes
    replica.state = models.REGISTERED
    replica.sequence = models.NO_SEQUENCE
    replica.heartbeat_at = None
    replica.registered_at = database_time(session)
    session.flush()
    session.execute(delete(ReplicaResident).where(ReplicaResident.replica_id == replica.id))
    return replica


def record_heartbeat(session: WriteSession, heartbeat: Heartbeat, *, replica_id: str) -> bool:
    """False if a later heartbeat was recorded before this one."""
    newer = and_(Replica.id == replica_id, Replica.sequence < heartbeat.sequence)
    values = heartbeat.model_dump(include={"sequence", "state", "num_queued", "num_running", "num_free_pages"})
    result = session.execute(update(Replica).where(newer).values(heartbeat_at=utc_now(), **values).returning(Replica.id))
    return result.first() is not None


def replace_residents(session: WriteSession, residents: Sequence[Resident], *, replica_id: str) -> None:
    """Writes what changed since the last report, which is little every two seconds."""
    reported = {(resident.tenant, resident.form_digest): resident.tier for resident in residents}
    rows = session.execute(select(ReplicaResident.tenant_id, ReplicaResident.form_digest, ReplicaResident.tier).where(_of(replica_id)))
    known: dict[tuple[str, str], str] = {(tenant_id, form_digest): tier for tenant_id, form_digest, tier in rows}
    stale = [key for key in known if reported.get(key) != known[key]]
    fresh = [key for key in reported if reported[key] != known.get(key)]
    for tenant_id, form_digest in stale:
        one = and_(ReplicaResident.tenant_id == tenant_id, ReplicaResident.form_digest == form_digest)
        session.execute(delete(ReplicaResident).where(_of(replica_id), one))
    if fresh:
        session.execute(insert(ReplicaResident), [_resident_row(replica_id, key, tier=reported[key]) for key in fresh])


def _of(replica_id: str) -> ColumnElement[bool]:
    return ReplicaResident.replica_id == replica_id


def _resident_row(replica_id: str, key: tuple[str, str], *, tier: str) -> dict[str, str]:
    return {"replica_id": replica_id, "tenant_id": key[0], "form_digest": key[1], "tier": tier}


def unwanted_residents(session: ReadSession, *, replica_id: str) -> list[Resident]:
    """What the replica holds of adapters, versions or tenants that are gone."""
    alive = _forms_alive(literal(1)).where(Form.tenant_id == ReplicaResident.tenant_id, Form.form_digest == ReplicaResident.form_digest)
    statement = select(ReplicaResident.tenant_id, ReplicaResident.form_digest, ReplicaResident.tier).where(
        _of(replica_id), ~exists(alive.correlate(ReplicaResident))
    )
    rows = session.execute(statement)
    return [Resident(tenant=tenant_id, form_digest=form_digest, tier=tier) for tenant_id, form_digest, tier in rows]


def forget_silent_replicas(session: WriteSession, *, silent_s: float) -> None:
    """Replicas that came and went: a new port or host is a new row, and nobody deregisters a crashed process."""
    last_sign = func.coalesce(Replica.heartbeat_at, Replica.registered_at)
    silent = select(Replica.id).where(last_sign < from_now(literal(_ago(silent_s)))).scalar_subquery()
    session.execute(delete(ReplicaResident).where(ReplicaResident.replica_id.in_(silent)))
    session.execute(delete(Replica).where(Replica.id.in_(silent)))


def num_by_state(session: ReadSession, *, ttl_s: float) -> dict[str, int]:
    """Replicas by state; those that should report and do not are `silent`, the others of them `live`."""
    live = func.coalesce(is_live(literal(_ago(ttl_s))), false())
    named = case((live, "live"), (Replica.state == models.READY, "silent"), else_=Replica.state)
    rows = session.execute(select(named.label("named"), func.count()).group_by("named"))
    return {row[0]: row[1] for row in rows}


def list_replicas(session: ReadSession, *, cursor: str | None, limit: int, ttl_s: float) -> Sequence[Row[Any]]:
    """Rows (Replica, base model name, live, number of residents), newest registration first, one more than `limit`."""
    num_residents = select(func.count()).where(ReplicaResident.replica_id == Replica.id).correlate(Replica).scalar_subquery()
    live = func.coalesce(is_live(literal(_ago(ttl_s))), false())
    statement = select(Replica, BaseModelRevision.name, live, num_residents).join(
        BaseModelRevision, BaseModelRevision.id == Replica.base_model_id
    )
    return session.execute(after_cursor(statement, cursor, at=Replica.registered_at, row_id=Replica.id, limit=limit)).all()
