"""The audit log: state changes written inside their own transaction, refusals in one of theirs, and the export of all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import structlog
from sqlalchemy import ColumnElement
from sqlalchemy.exc import SQLAlchemyError

from registry import metrics
from registry.audit import repository
from registry.audit.models import AuditEvent
from registry.audit.repository import Wanted
from registry.audit.schemas import AuditEventOut
from registry.audit.source import current_source
from registry.db import Database, WriteSession, reaching_tenant
from registry.errors import NotFound
from registry.inserts import table_of
from registry.tenants.auth import Subject

log = structlog.get_logger(__name__)

DONE, REFUSED = "done", "refused"
EXPORT_PAGE = 500


@dataclass(frozen=True)
class Listener:
    """Who hears of events, inside their transaction.

    `asks` gives the condition, in SQL, under which an event is for `hear`; None: it never is. The INSERT of the event
    answers it, so that where nobody listens nothing is asked.
    """

    asks: Callable[[AuditEvent], ColumnElement[bool] | None]
    hear: Callable[[WriteSession, AuditEvent], None]


_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """For the layers above, once, where they are imported."""
    _listeners.append(listener)


def record(
    session: WriteSession,
    subject: Subject,
    action: str,
    resource_type: str,
    resource_id: str,
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    tenant_id: str | None = None,
    outcome: str = DONE,
) -> AuditEvent:
    """Add one event to the caller's transaction: the change and its record happen together or not at all.

    `action` is `<noun>.<past participle>`, such as `alias.moved`. `tenant_id` defaults to the subject's.
    """
    assert "." in action, f"audit action {action!r} is not <noun>.<past participle>"
    logged, source = structlog.contextvars.get_contextvars(), current_source()
    values: dict[str, Any] = {
        "id": uuid4().hex,
        "tenant_id": tenant_id or subject.tenant_id,
        "key_id": subject.key_id,
        "action": action,
        "outcome": outcome,
        "resource_type": resource_type,
        "resource_id": resource_id[:256],
        "before": None if before is None else dict(before),
        "after": None if after is None else dict(after),
        "request_id": logged.get("request_id"),
        "address": source.address,
        "user_agent": source.user_agent,
        "job_id": logged.get("job_id"),
    }
    event = AuditEvent(**values)
    _write(session, event, values)
    return event


def _write(session: WriteSession, event: AuditEvent, values: Mapping[str, Any]) -> None:
    """Insert the row, and let hear of it who asks for it."""
    asked = [(listener, condition) for listener in _listeners if (condition := listener.asks(event)) is not None]
    written = table_of(AuditEvent).insert().values(**values)
    if not asked:
        session.execute(written)
        return
    answers = session.execute(written.returning(*(condition for _, condition in asked))).one()
    for (listener, _), answer in zip(asked, answers, strict=True):
        if answer:
            listener.hear(session, event)


def record_refusal(database: Database, subject: Subject, *, method: str, path: str, status: int, reason: str) -> None:
    """Keep a refused request, in a transaction of its own: the refused one was rolled back.

    Where the database cannot take it, the log line stands alone; the refusal itself must not turn into another error.
    """
    details = {"method": method, "status": status, "reason": reason}
    metrics.audit_refusals.labels(str(status)).inc()
    log.warning("request.refused", key_id=subject.key_id, path=path, **details)
    try:
        with database.system_write() as session:
            record(session, subject, "request.refused", "path", path, after=details, outcome=REFUSED)
    except SQLAlchemyError as error:
        log.error("audit.refusal_not_written", error=type(error).__name__)


def export(database: Database, tenant_id: str | None, wanted: Wanted, *, after: str | None) -> Iterator[bytes]:
    """Events as JSON lines, oldest first, a page at a time: no session lives longer than a page is read.

    Raises NotFound, before anything is streamed, where `after` is no event of the tenant.
    """
    last = _found(database, tenant_id, after) if after is not None else None
    rows = _page(database, tenant_id, wanted, after=last)

    def lines() -> Iterator[bytes]:
        page = rows
        while page:
            yield b"".join(AuditEventOut.model_validate(row).model_dump_json().encode() + b"\n" for row in page)
            page = _page(database, tenant_id, wanted, after=page[-1]) if len(page) == EXPORT_PAGE else []

    return lines()


def _page(database: Database, tenant_id: str | None, wanted: Wanted, *, after: AuditEvent | None) -> Sequence[AuditEvent]:
    # Said anew for each page: a stream outlives the request's own dependencies.
    with reaching_tenant(tenant_id), database.read() as session:
        return repository.events_after(session, tenant_id, wanted, after=after, limit=EXPORT_PAGE)


def _found(database: Database, tenant_id: str | None, event_id: str) -> AuditEvent:
    with reaching_tenant(tenant_id), database.read() as session:
        event = repository.find(session, tenant_id, event_id)
    if event is None:
        raise NotFound(f"there is no event {event_id!r}", field="after", value=event_id, remedy="the id of the last line that arrived")
    return event
