"""`/webhooks`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Conflict, Forbidden, Invalid, NotFound, problem_responses
from registry.outbound import OutboundClient
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.sealing import Sealer
from registry.tenants.auth import TenantSubject, require
from registry.webhooks import repository, service
from registry.webhooks.models import WebhookEndpoint
from registry.webhooks.schemas import DeliveryOut, DeliveryState, RotationIn, WebhookCreated, WebhookIn, WebhookOut, WebhookPatch

router = APIRouter(prefix="/webhooks", tags=["webhooks"], route_class=Route)

Writer = Annotated[TenantSubject, Depends(require("webhooks:write"))]

ERRORS = problem_responses(BadRequest, Forbidden, Invalid, NotFound)
CONFLICTS = ERRORS | problem_responses(Conflict)


def _sealer(request: Request) -> Sealer:
    sealer: Sealer = request.app.state.sealer
    return sealer


def _outbound(request: Request) -> OutboundClient:
    outbound: OutboundClient = request.app.state.outbound
    return outbound


SealerDep = Annotated[Sealer, Depends(_sealer)]
OutboundDep = Annotated[OutboundClient, Depends(_outbound)]


@router.post("", status_code=201, responses=problem_responses(BadRequest, Forbidden, Invalid, Conflict))
def create_webhook(
    wanted: WebhookIn, subject: Writer, session: WriteSessionDep, sealer: SealerDep, outbound: OutboundDep
) -> WebhookCreated:
    """The signing secret is in this answer and never again. Deliveries are made at least once, in no promised order."""
    return _with_secret(*service.create(session, subject, wanted, policy=outbound.policy, sealer=sealer))


@router.get("", responses=problem_responses(BadRequest, Forbidden))
def list_webhooks(subject: Writer, session: ReadSessionDep) -> list[WebhookOut]:
    """The tenant's webhooks, newest first."""
    return [WebhookOut.model_validate(endpoint) for endpoint in repository.endpoints(session, subject.tenant_id)]


@router.get("/{webhook_id}", responses=ERRORS)
def get_webhook(webhook_id: str, subject: Writer, session: ReadSessionDep) -> WebhookOut:
    return WebhookOut.model_validate(service.get(session, subject.tenant_id, webhook_id))


@router.patch("/{webhook_id}", responses=ERRORS)
def patch_webhook(webhook_id: str, patch: WebhookPatch, *, subject: Writer, session: WriteSessionDep, outbound: OutboundDep) -> WebhookOut:
    """Change it; what is left out stays. A disabled webhook hears of nothing new; what was pending waits."""
    return WebhookOut.model_validate(service.update(session, subject, webhook_id, patch, policy=outbound.policy))


@router.delete("/{webhook_id}", status_code=204, responses=ERRORS)
def delete_webhook(webhook_id: str, subject: Writer, session: WriteSessionDep) -> None:
    """With its delivery log; what is pending is not delivered."""
    service.delete(session, subject, webhook_id)


@router.post("/{webhook_id}/rotate", responses=ERRORS)
def rotate_secret(webhook_id: str, wanted: RotationIn, *, subject: Writer, session: WriteSessionDep, sealer: SealerDep) -> WebhookCreated:
    """A new secret, in this answer and never again; the old one signs beside it for `overlap_s`."""
    return _with_secret(*service.rotate(session, subject, webhook_id, overlap_s=wanted.overlap_s, sealer=sealer))


@router.post("/{webhook_id}/ping", status_code=202, responses=CONFLICTS)
def ping_webhook(webhook_id: str, subject: Writer, session: WriteSessionDep) -> DeliveryOut:
    """Send a `ping` event; watch the delivery to see how it went."""
    return DeliveryOut.of(service.ping(session, subject, webhook_id))


@router.get("/{webhook_id}/deliveries", responses=ERRORS)
def list_deliveries(
    webhook_id: str,
    *,
    subject: Writer,
    session: ReadSessionDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[DeliveryState | None, Query(description="Only deliveries in this state.")] = None,
) -> Page[DeliveryOut]:
    """The delivery log, newest event first."""
    endpoint = service.get(session, subject.tenant_id, webhook_id)
    rows = repository.deliveries(session, subject.tenant_id, endpoint.id, state=state, limit=limit, cursor=cursor)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=DeliveryOut.of)


@router.get("/{webhook_id}/deliveries/{delivery_id}", responses=ERRORS)
def get_delivery(webhook_id: str, delivery_id: str, subject: Writer, session: ReadSessionDep) -> DeliveryOut:
    return DeliveryOut.of(service.get_delivery(session, subject.tenant_id, webhook_id, delivery_id))


@router.post("/{webhook_id}/deliveries/{delivery_id}/replay", status_code=202, responses=CONFLICTS)
def replay_delivery(webhook_id: str, delivery_id: str, subject: Writer, session: WriteSessionDep) -> DeliveryOut:
    """Deliver the event again under its old `webhook-id`. 409 while it is still under way."""
    return DeliveryOut.of(service.replay(session, subject, webhook_id, delivery_id))


def _with_secret(endpoint: WebhookEndpoint, secret: str) -> WebhookCreated:
    return WebhookCreated(secret=secret, **WebhookOut.model_validate(endpoint).model_dump())
