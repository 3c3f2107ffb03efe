"""Rules of webhooks: endpoints and their secrets, and turning what the audit log hears into events.

Events are heard where the audit log is written (`audit.service.listen`): whatever is audited inside a unit of work can
be told to a tenant's endpoints, in the very same transaction, and no domain has to know of webhooks. Deliveries are
made at least once and in no promised order; `webhook-id` is the same in every attempt and every replay.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, get_args
from uuid import uuid4

from sqlalchemy import ColumnElement

from registry.audit import service as audit
from registry.audit.models import AuditEvent
from registry.db import ReadSession, WriteSession, database_time
from registry.errors import Conflict, NotFound
from registry.outbound_policy import OutboundPolicy
from registry.sealing import Sealer
from registry.tenants.auth import TenantSubject
from registry.webhooks import repository
from registry.webhooks.models import PENDING, WebhookDelivery, WebhookEndpoint, WebhookEvent
from registry.webhooks.schemas import EventType, WebhookIn, WebhookPatch
from registry.webhooks.signing import new_secret

MAX_ENDPOINTS = 20
EVERYTHING = "*"
PING = "ping"
EVENT_TYPES = frozenset(get_args(EventType)) - {EVERYTHING}
BY_OPERATOR = "disabled by request"


def asks(audited: AuditEvent) -> ColumnElement[bool] | None:
    """Whether its tenant has an endpoint at all, where it is of a type that can be asked for."""
    if audited.action not in EVENT_TYPES or audited.outcome != audit.DONE or audited.tenant_id is None:
        return None
    return repository.has_enabled(audited.tenant_id)


def hear(session: WriteSession, audited: AuditEvent) -> None:
    """Write an event and its deliveries beside the audit event, where an endpoint of the tenant asks for this type."""
    assert audited.tenant_id is not None, "`asks` has looked"
    with session.no_autoflush:  # a service may be half-way through its own changes
        found = repository.endpoints(session, audited.tenant_id)
    wanted = [endpoint for endpoint in found if endpoint.enabled and {audited.action, EVERYTHING} & set(endpoint.event_types)]
    if not wanted:
        return
    resource = {"type": audited.resource_type, "id": audited.resource_id}
    data = {"resource": resource, "before": audited.before, "after": audited.after, "key_id": audited.key_id}
    _publish(session, audited.tenant_id, audited.action, data, wanted)


def _publish(
    session: WriteSession, tenant_id: str, event_type: str, data: dict[str, Any], wanted: list[WebhookEndpoint]
) -> list[WebhookDelivery]:
    event = WebhookEvent(id=uuid4().hex, tenant_id=tenant_id, type=event_type, data=data)
    session.add(event)
    made = [WebhookDelivery(tenant_id=tenant_id, endpoint_id=endpoint.id, event_id=event.id, event=event) for endpoint in wanted]
    session.add_all(made)
    return made


def create(
    session: WriteSession, subject: TenantSubject, wanted: WebhookIn, *, policy: OutboundPolicy, sealer: Sealer
) -> tuple[WebhookEndpoint, str]:
    """The endpoint and its secret, told this once. Raises OutboundRefused, Conflict."""
    policy.check_url(wanted.url)
    if repository.count(session, subject.tenant_id) >= MAX_ENDPOINTS:
        raise Conflict(f"this tenant has {MAX_ENDPOINTS} webhooks already", field="url", remedy="delete one")
    endpoint = WebhookEndpoint(
        id=uuid4().hex,
        tenant_id=subject.tenant_id,
        url=wanted.url,
        description=wanted.description,
        event_types=sorted(set(wanted.event_types)),
        created_by=subject.key_id,
    )
    secret = new_secret()
    endpoint.secret = sealer.seal(secret, context=context(endpoint))
    session.add(endpoint)
    session.flush()
    _audit(session, subject, "webhook.created", endpoint, after={"url": _bare(endpoint.url), "event_types": endpoint.event_types})
    return endpoint, secret


def context(endpoint: WebhookEndpoint) -> str:
    """What its sealed secrets are bound to."""
    return f"webhook/{endpoint.tenant_id}/{endpoint.id}"


def get(session: ReadSession, tenant_id: str, endpoint_id: str) -> WebhookEndpoint:
    endpoint = repository.find(session, tenant_id, endpoint_id)
    if endpoint is None:
        raise NotFound(f"there is no webhook {endpoint_id!r}", field="id", value=endpoint_id, remedy="see `GET /api/v1/webhooks`")
    return endpoint


def update(
    session: WriteSession, subject: TenantSubject, endpoint_id: str, patch: WebhookPatch, *, policy: OutboundPolicy
) -> WebhookEndpoint:
    endpoint = get(session, subject.tenant_id, endpoint_id)
    change = patch.model_dump(exclude_none=True)
    before = {name: _bare(endpoint.url) if name == "url" else getattr(endpoint, name) for name in change}
    if patch.url is not None:
        policy.check_url(patch.url)
    if patch.enabled is not None:
        endpoint.disabled_reason = None if patch.enabled else BY_OPERATOR
    for name, value in change.items():
        setattr(endpoint, name, value)
    shown = change | ({"url": _bare(endpoint.url)} if patch.url is not None else {})
    _audit(session, subject, "webhook.updated", endpoint, before=before, after=shown)
    return endpoint


def delete(session: WriteSession, subject: TenantSubject, endpoint_id: str) -> None:
    """With its deliveries: what is under way arrives, and nothing more."""
    endpoint = get(session, subject.tenant_id, endpoint_id)
    session.delete(endpoint)
    _audit(session, subject, "webhook.deleted", endpoint, before={"url": _bare(endpoint.url)})


def rotate(
    session: WriteSession, subject: TenantSubject, endpoint_id: str, *, overlap_s: int, sealer: Sealer
) -> tuple[WebhookEndpoint, str]:
    """A new secret, told this once; the old one signs beside it for `overlap_s`."""
    endpoint = get(session, subject.tenant_id, endpoint_id)
    secret = new_secret()
    endpoint.previous_secret = endpoint.secret
    endpoint.previous_until = database_time(session) + dt.timedelta(seconds=overlap_s)
    endpoint.secret = sealer.seal(secret, context=context(endpoint))
    _audit(session, subject, "webhook.rotated", endpoint, after={"overlap_s": overlap_s})
    return endpoint, secret


def ping(session: WriteSession, subject: TenantSubject, endpoint_id: str) -> WebhookDelivery:
    """A delivery of type `ping` to this endpoint, whatever it subscribed to. Raises Conflict while it is disabled."""
    endpoint = get(session, subject.tenant_id, endpoint_id)
    _must_be_enabled(endpoint)
    (made,) = _publish(session, subject.tenant_id, PING, {"webhook": endpoint.id}, [endpoint])
    session.flush()
    _audit(session, subject, "webhook.pinged", endpoint)
    return get_delivery(session, subject.tenant_id, endpoint_id, made.id)


def get_delivery(session: ReadSession, tenant_id: str, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    get(session, tenant_id, endpoint_id)
    found = repository.delivery(session, tenant_id, endpoint_id, delivery_id)
    if found is None:
        raise NotFound(f"there is no delivery {delivery_id!r}", field="delivery_id", value=delivery_id, remedy="list the deliveries")
    return found


def replay(session: WriteSession, subject: TenantSubject, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    """Deliver an event again, with its old webhook-id and all attempts anew. Raises Conflict for one still under way."""
    endpoint = get(session, subject.tenant_id, endpoint_id)
    _must_be_enabled(endpoint)
    found = get_delivery(session, subject.tenant_id, endpoint_id, delivery_id)
    if found.state == PENDING:
        raise Conflict("this delivery is still under way", field="state", value=found.state, remedy="wait for its end")
    found.state, found.attempt, found.fence = PENDING, 0, found.fence + 1
    found.available_at, found.finished_at = database_time(session), None
    session.flush()
    _audit(session, subject, "webhook.replayed", endpoint, after={"delivery_id": delivery_id})
    return found


def _must_be_enabled(endpoint: WebhookEndpoint) -> None:
    if not endpoint.enabled:
        raise Conflict(
            f"this webhook is disabled ({endpoint.disabled_reason})", field="enabled", value=False, remedy="PATCH it with enabled: true"
        )


def _bare(url: str) -> str:
    """Without the query, where many receivers keep a token."""
    return url.partition("?")[0]


def _audit(
    session: WriteSession,
    subject: TenantSubject,
    action: str,
    endpoint: WebhookEndpoint,
    *,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    audit.record(session, subject, action, "webhook", endpoint.id, before=before, after=after, tenant_id=subject.tenant_id)


audit.listen(audit.Listener(asks=asks, hear=hear))
