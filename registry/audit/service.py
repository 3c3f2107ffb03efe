"""Writing the audit log: state changes inside their own transaction, refusals in one of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

import structlog
from sqlalchemy.exc import SQLAlchemyError

from registry import metrics
from registry.audit.models import AuditEvent
from registry.db import Database, WriteSession
from registry.tenants.auth import Subject

log = structlog.get_logger(__name__)

DONE, REFUSED = "done", "refused"

Listener = Callable[[WriteSession, AuditEvent], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call `listener` with every event, inside its transaction. For the layers above, once, where they are imported."""
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
    event = AuditEvent(
        id=uuid4().hex,
        tenant_id=tenant_id or subject.tenant_id,
        key_id=subject.key_id,
        action=action,
        outcome=outcome,
        resource_type=resource_type,
        resource_id=resource_id[:256],
        before=None if before is None else dict(before),
        after=None if after is None else dict(after),
        request_id=structlog.contextvars.get_contextvars().get("request_id"),
    )
    session.add(event)
    for listener in _listeners:
        listener(session, event)
    return event


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
