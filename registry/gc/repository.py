"""Queries of the garbage collector, across tenants and a page at a time: none of them holds more than a page in memory.

Mark: a blob is garbage when no reference names it, no upload is on its way to it and it was left alone for the grace time.
Sweep: its row is taken (`take`, `take_orphans`), the bytes are removed outside of any transaction, the row is removed
(`settle`). Who wants the bytes meanwhile meets the taken row. A collector that dies leaves taken rows, which another one
takes over when their time is up.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Collection as Several
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, CursorResult, Select, and_, delete, exists, func, literal, or_, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import joinedload, selectinload

from registry.adapters.models import DELETED, AdapterVersion
from registry.blobs.models import Blob, BlobReference
from registry.blobs.store import StoredBlob
from registry.db import ReadSession, WriteSession, database_time
from registry.gc.models import BlobKey
from registry.jobs.models import FINAL, Job
from registry.jobs.service import COLLECT_GARBAGE
from registry.pagination import after_cursor
from registry.tenants.models import Tenant
from registry.uploads.models import LIVE, OPEN, LargeUpload

_SCHEDULE_LOCK = 0x6C6F7267


class VersionKey(NamedTuple):
    tenant_id: str
    adapter_id: str
    version_id: str


class Garbage(NamedTuple):
    """A blob that may go, or an object of the store that has no row."""

    tenant_id: str
    sha256: str
    size: int


# ---- collections, which are jobs ----


def lock_schedule(session: WriteSession) -> None:
    """Whoever starts collections does so one after the other. (SQLite has one writer anyway.)"""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _SCHEDULE_LOCK})


def live_collection(session: ReadSession, *, dry_run: bool) -> Job | None:
    statement = select(Job).where(
        Job.kind == COLLECT_GARBAGE, Job.state.not_in(FINAL), Job.payload["dry_run"].as_boolean() == dry_run, Job.tenant_id.is_(None)
    )
    return session.scalar(statement.order_by(Job.created_at).limit(1))


def last_collection(session: ReadSession) -> Job | None:
    """The real one that was asked for last, however it ended."""
    statement = select(Job).where(Job.kind == COLLECT_GARBAGE, Job.payload["dry_run"].as_boolean().is_(False))
    return session.scalar(statement.order_by(Job.created_at.desc(), Job.id.desc()).limit(1))


def collection(session: ReadSession, job_id: str) -> Job | None:
    return session.scalar(select(Job).where(Job.id == job_id, Job.kind == COLLECT_GARBAGE))


def collections_page(session: ReadSession, *, cursor: str | None, limit: int) -> Sequence[Job]:
    statement = select(Job).where(Job.kind == COLLECT_GARBAGE)
    return session.scalars(after_cursor(statement, cursor, at=Job.created_at, row_id=Job.id, limit=limit)).all()


# ---- versions ----


def _unindexed() -> ColumnElement[bool]:
    """Of a program before references, which may still run beside this one: such a version's blobs have no other protection."""
    return and_(AdapterVersion.purged_at.is_(None), ~exists().where(BlobReference.owner_id == AdapterVersion.id))


def unindexed_versions(session: ReadSession, *, limit: int) -> Sequence[AdapterVersion]:
    statement = select(AdapterVersion).where(_unindexed()).options(selectinload(AdapterVersion.forms))
    return session.scalars(statement.order_by(AdapterVersion.id).limit(limit)).all()


def mark_deletion_times(session: WriteSession) -> None:
    """Versions that a program before `deleted_at` deleted count from now."""
    options = {"synchronize_session": False}
    unmarked = (AdapterVersion.status == DELETED, AdapterVersion.deleted_at.is_(None))
    session.execute(update(AdapterVersion).where(*unmarked).values(deleted_at=database_time(session)), execution_options=options)


def _to_purge(deleted_before: dt.datetime | None) -> Select[str, str, str]:
    """Deleted before then, or of a tenant that was; None: only what an operator asked for."""
    over: ColumnElement[bool] = Tenant.purge_requested_at.is_not(None)
    if deleted_before is not None:
        gone = and_(AdapterVersion.status == DELETED, AdapterVersion.deleted_at < deleted_before)
        over = or_(over, Tenant.deleted_at < deleted_before, gone)
    return (
        select(AdapterVersion.tenant_id, AdapterVersion.adapter_id, AdapterVersion.id)
        .join(Tenant, Tenant.id == AdapterVersion.tenant_id)
        .where(AdapterVersion.purged_at.is_(None), over)
    )


def versions_to_purge(session: ReadSession, *, deleted_before: dt.datetime | None, limit: int) -> list[VersionKey]:
    statement = _to_purge(deleted_before).order_by(AdapterVersion.adapter_id, AdapterVersion.id)
    return [VersionKey(*row) for row in session.execute(statement.limit(limit))]


def is_to_purge(session: ReadSession, key: VersionKey, *, deleted_before: dt.datetime | None) -> bool:
    return session.execute(_to_purge(deleted_before).where(AdapterVersion.id == key.version_id)).first() is not None


def count_versions_to_purge(session: ReadSession, *, deleted_before: dt.datetime | None) -> int:
    return session.scalar(select(func.count()).select_from(_to_purge(deleted_before).subquery())) or 0


def version_to_purge(session: WriteSession, version_id: str) -> AdapterVersion | None:
    """With what a purge needs of it, as it is now."""
    statement = select(AdapterVersion).where(AdapterVersion.id == version_id)
    loads = (joinedload(AdapterVersion.adapter), selectinload(AdapterVersion.forms))
    return session.scalar(statement.options(*loads).execution_options(populate_existing=True))


# ---- uploads ----


def _overdue(now: dt.datetime) -> ColumnElement[bool]:
    gone = exists().where(Tenant.id == LargeUpload.tenant_id, Tenant.deleted_at.is_not(None))
    return and_(LargeUpload.state == OPEN, or_(LargeUpload.expires_at <= now, gone))


def overdue_uploads(session: ReadSession, *, limit: int) -> list[tuple[str, str]]:
    """(tenant id, upload id) of open uploads whose time is over, or whose tenant is gone."""
    statement = select(LargeUpload.tenant_id, LargeUpload.id).where(_overdue(database_time(session)))
    return [(tenant_id, upload_id) for tenant_id, upload_id in session.execute(statement.order_by(LargeUpload.id).limit(limit))]


def count_overdue_uploads(session: ReadSession) -> int:
    return session.scalar(select(func.count()).select_from(LargeUpload).where(_overdue(database_time(session)))) or 0


# ---- blobs ----


def _needed() -> ColumnElement[bool]:
    """Somebody references it, or is uploading it in parts."""
    referenced = exists().where(BlobReference.tenant_id == Blob.tenant_id, BlobReference.sha256 == Blob.sha256)
    arriving = exists().where(LargeUpload.tenant_id == Blob.tenant_id, LargeUpload.sha256 == Blob.sha256, LargeUpload.state.in_(LIVE))
    return or_(referenced, arriving)


def _garbage(now: dt.datetime, touched_before: dt.datetime) -> ColumnElement[bool]:
    """Needed by nobody, and left alone for long enough or taken by a collector whose time is up."""
    left_alone = func.coalesce(Blob.touched_at, Blob.created_at) < literal(touched_before, Blob.created_at.type)
    return and_(~_needed(), or_(and_(Blob.deleting_until.is_(None), left_alone), Blob.deleting_until < now))


def end_of_page(session: ReadSession, after: BlobKey | None, *, limit: int) -> BlobKey | None:
    """The last address of the next `limit` rows; None where there is none. Every statement on a page looks at that many rows at most."""
    statement = select(Blob.tenant_id, Blob.sha256).where(_beyond(after)).order_by(Blob.tenant_id, Blob.sha256).limit(limit)
    page = statement.subquery()
    found = session.execute(select(page).order_by(page.c.tenant_id.desc(), page.c.sha256.desc()).limit(1)).one_or_none()
    return None if found is None else BlobKey(*found)


def garbage(session: ReadSession, *, after: BlobKey | None, until: BlobKey, touched_before: dt.datetime) -> list[Garbage]:
    """What may go on the page (after, until], by a look without locks."""
    statement = select(Blob.tenant_id, Blob.sha256, Blob.size).where(
        _beyond(after), _key() <= _literal(until), _garbage(database_time(session), touched_before)
    )
    return [Garbage(*row) for row in session.execute(statement.order_by(Blob.tenant_id, Blob.sha256))]


def take(session: WriteSession, found: Several[Garbage], *, by: str, hold_s: float, touched_before: dt.datetime) -> list[Garbage]:
    """Those of `found` that are garbage now, taken: from here on nobody may refer to them. Who holds a row in any way keeps it.

    Locked first and looked at after that, in a statement of its own: PostgreSQL would look at the references as they were
    before it waited.
    """
    keys = [(one.tenant_id, one.sha256) for one in found]
    locked = select(Blob.tenant_id, Blob.sha256).where(_key().in_(keys)).order_by(Blob.tenant_id, Blob.sha256)
    keys = [(tenant_id, sha256) for tenant_id, sha256 in session.execute(locked.with_for_update(skip_locked=True))]
    now = database_time(session)
    still = select(Blob.tenant_id, Blob.sha256, Blob.size).where(_key().in_(keys), _garbage(now, touched_before), ~_has_unindexed())
    taken = [Garbage(*row) for row in session.execute(still)]
    values = {"deleting_until": now + dt.timedelta(seconds=hold_s), "deleting_by": by}
    _update(session, update(Blob).where(_key().in_([(one.tenant_id, one.sha256) for one in taken])).values(**values))
    return taken


def _has_unindexed() -> ColumnElement[bool]:
    return exists().where(AdapterVersion.tenant_id == Blob.tenant_id, _unindexed())


def known_tenants(session: ReadSession, tenant_ids: Several[str]) -> set[str]:
    return set(session.scalars(select(Tenant.id).where(Tenant.id.in_(tenant_ids))))


def without_rows(session: ReadSession, found: Several[Garbage]) -> list[Garbage]:
    """Objects that no row promises and no upload is about to record."""
    keys = [(one.tenant_id, one.sha256) for one in found]
    rows = {BlobKey(*row) for row in session.execute(select(Blob.tenant_id, Blob.sha256).where(_key().in_(keys)))}
    arriving = select(LargeUpload.tenant_id, LargeUpload.sha256).where(
        tuple_(LargeUpload.tenant_id, LargeUpload.sha256).in_(keys), LargeUpload.state.in_(LIVE)
    )
    rows |= {BlobKey(*row) for row in session.execute(arriving)}
    return [one for one in found if BlobKey(one.tenant_id, one.sha256) not in rows]


def pages(listed: Iterable[StoredBlob], *, size: int) -> Iterator[list[StoredBlob]]:
    """A listing of the store, `size` objects at a time."""
    rest = iter(listed)
    while page := list(itertools.islice(rest, size)):
        yield page


def take_orphans(session: WriteSession, found: Several[Garbage], *, by: str, hold_s: float) -> list[Garbage]:
    """Give each object a row that is taken, so that an upload of the same bytes meets it; not where there is a row by now."""
    found = without_rows(session, found)
    if not found:
        return []
    now = database_time(session)
    until = now + dt.timedelta(seconds=hold_s)
    rows = [{**one._asdict(), "created_at": now, "touched_at": None, "deleting_until": until, "deleting_by": by} for one in found]
    insert = postgresql_insert if session.get_bind().dialect.name == "postgresql" else sqlite_insert
    added = session.execute(insert(Blob).values(rows).on_conflict_do_nothing().returning(Blob.tenant_id, Blob.sha256, Blob.size))
    return [Garbage(*row) for row in added]


def put_back(session: WriteSession, untouched: Several[Garbage], *, by: str) -> None:
    """Taken, and not asked of the store: the next collector, or who uploads the bytes again, need not wait.

    Not as if nothing had been: a collector before this one may have removed the bytes and died.
    """
    keys = [(one.tenant_id, one.sha256) for one in untouched]
    _update(session, update(Blob).where(_key().in_(keys), Blob.deleting_by == by).values(deleting_until=database_time(session)))


def settle(session: WriteSession, gone: Several[Garbage], *, by: str) -> None:
    """The bytes are gone: the rows go too, unless another collector took them over."""
    keys = [(one.tenant_id, one.sha256) for one in gone]
    _update(session, delete(Blob).where(_key().in_(keys), Blob.deleting_by == by))


def _key() -> Any:
    return tuple_(Blob.tenant_id, Blob.sha256)


def _literal(key: BlobKey) -> Any:
    return tuple_(literal(key.tenant_id), literal(key.sha256))


def _beyond(after: BlobKey | None) -> ColumnElement[bool]:
    return literal(True) if after is None else _key() > _literal(after)


# ---- looking at what is recorded ----


def count_recorded(session: ReadSession) -> int:
    return session.scalar(select(func.count()).select_from(Blob).where(Blob.deleting_until.is_(None))) or 0


def recorded_bytes(session: ReadSession) -> int:
    return int(session.scalar(select(func.coalesce(func.sum(Blob.size), 0)).where(Blob.deleting_until.is_(None))) or 0)


def recorded_page(session: ReadSession, *, after: BlobKey | None, limit: int) -> list[Garbage]:
    statement = select(Blob.tenant_id, Blob.sha256, Blob.size).where(_beyond(after), Blob.deleting_until.is_(None))
    return [Garbage(*row) for row in session.execute(statement.order_by(Blob.tenant_id, Blob.sha256).limit(limit))]


def sample_recorded(session: ReadSession, *, limit: int) -> list[Garbage]:
    statement = select(Blob.tenant_id, Blob.sha256, Blob.size).where(Blob.deleting_until.is_(None))
    return [Garbage(*row) for row in session.execute(statement.order_by(func.random()).limit(limit))]


def count_unreferenced(session: ReadSession) -> tuple[int, int]:
    """(blobs, bytes) that nobody needs."""
    statement = select(func.count(), func.coalesce(func.sum(Blob.size), 0)).where(~_needed(), Blob.deleting_until.is_(None))
    count, size = session.execute(statement).one()
    return int(count), int(size)


def unrecorded(session: ReadSession, *, limit: int) -> list[BlobKey]:
    """What some version needs and no row promises."""
    promised = exists().where(Blob.tenant_id == BlobReference.tenant_id, Blob.sha256 == BlobReference.sha256, Blob.deleting_until.is_(None))
    statement = select(BlobReference.tenant_id, BlobReference.sha256).where(~promised).distinct().limit(limit)
    return [BlobKey(*row) for row in session.execute(statement)]


# ---- rows that tell of what is over ----


def _ended_jobs(before: dt.datetime) -> ColumnElement[bool]:
    return and_(Job.state.in_(FINAL), Job.finished_at < before)


def _ended_uploads(before: dt.datetime) -> ColumnElement[bool]:
    return and_(LargeUpload.state.not_in(LIVE), LargeUpload.expires_at < before)


def count_ended(session: ReadSession, *, before: dt.datetime) -> int:
    """Jobs and uploads that ended before then."""
    jobs = session.scalar(select(func.count()).select_from(Job).where(_ended_jobs(before))) or 0
    uploads = session.scalar(select(func.count()).select_from(LargeUpload).where(_ended_uploads(before))) or 0
    return jobs + uploads


def remove_ended(session: WriteSession, *, before: dt.datetime, limit: int) -> int:
    """Jobs, with their events and hints, and uploads: at most `limit` of each. Returns how many."""
    jobs = select(Job.id).where(_ended_jobs(before)).limit(limit)
    uploads = select(LargeUpload.id).where(_ended_uploads(before)).limit(limit)
    removed = _update(session, delete(Job).where(Job.id.in_(jobs)))
    return removed + _update(session, delete(LargeUpload).where(LargeUpload.id.in_(uploads)))


def _update(session: WriteSession, statement: Any) -> int:
    return cast(CursorResult[Any], session.execute(statement, execution_options={"synchronize_session": False})).rowcount
