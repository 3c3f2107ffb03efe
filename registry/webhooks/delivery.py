"""The life of one delivery: claim it, send it, keep what became of it. No transaction is open while bytes move.

A claim carries a fence, and whatever is written afterwards is conditional on it. A worker that dies between sending
and marking leaves a lease that runs out; then the delivery is sent again with the same `webhook-id`.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from registry.db import WriteSession, database_time
from registry.outbound import Caps, OutboundClient, OutboundFailed
from registry.outbound_policy import OutboundRefused
from registry.sealing import Sealer, Unsealable
from registry.webhooks import repository, signing
from registry.webhooks.models import DELIVERED, FAILED, WebhookDelivery, WebhookEvent
from registry.webhooks.service import context

MAX_LOG = 20
GONE = 410
MAX_BACKOFF_S = 12 * 3600.0
MAX_RETRY_AFTER_S = 24 * 3600.0
BACKOFF_BASE = 5.0
WORKER_LOST = {"status": None, "error": "worker_lost", "detail": "the worker did not tell how it ended"}


@dataclass(frozen=True)
class DeliveryLimits:
    """`lease_s` is longer than `total_s`, so that a live worker's delivery is never taken away from it."""

    max_attempts: int = 8
    first_retry_s: float = 5.0
    total_s: float = 15.0
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        assert self.lease_s > 2 * self.total_s, "a lease must outlast the delivery"


@dataclass(frozen=True)
class Claimed:
    """All that sending needs. `secrets` are sealed."""

    delivery_id: str
    fence: int
    attempt: int
    endpoint_id: str
    url: str
    secrets: tuple[str, ...]
    context: str
    event_id: str
    body: bytes
    now: dt.datetime


@dataclass(frozen=True)
class Outcome:
    """`status` None: no answer, and `error` says why. `retry_after_s` is what the receiver asked for."""

    status: int | None
    took_ms: int
    error: str | None = None
    detail: str | None = None
    retry_after_s: float | None = None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def claim(session: WriteSession, limits: DeliveryLimits) -> Claimed | None:
    """Take the delivery that has waited longest, or None. The transaction must commit before anything is sent."""
    while (row := repository.next_due(session)) is not None:
        now = database_time(session)
        log = _with_lost_attempt(row, now)
        if row.attempt >= limits.max_attempts:  # its last worker died; nobody tries again
            values: dict[str, Any] = {"state": FAILED, "finished_at": now, "lease_expires_at": None, "log": log}
            repository.transition(session, delivery_id=row.id, fence=row.fence, values=values)
            continue
        lease = now + dt.timedelta(seconds=limits.lease_s)
        values = {"fence": row.fence + 1, "attempt": row.attempt + 1, "lease_expires_at": lease, "log": log}
        if repository.transition(session, delivery_id=row.id, fence=row.fence, values=values):
            return _claimed(row, fence=row.fence + 1, attempt=row.attempt + 1, now=now)
    return None


def _with_lost_attempt(row: WebhookDelivery, now: dt.datetime) -> list[dict[str, Any]]:
    if row.lease_expires_at is None:
        return row.log
    return [*row.log, {"number": row.attempt, "at": now.isoformat(), "took_ms": None, **WORKER_LOST}][-MAX_LOG:]


def _claimed(row: WebhookDelivery, *, fence: int, attempt: int, now: dt.datetime) -> Claimed:
    endpoint = row.endpoint
    overlaps = endpoint.previous_secret is not None and endpoint.previous_until is not None and endpoint.previous_until > now
    sealed = (endpoint.secret, endpoint.previous_secret) if overlaps else (endpoint.secret,)
    return Claimed(
        delivery_id=row.id,
        fence=fence,
        attempt=attempt,
        endpoint_id=endpoint.id,
        url=endpoint.url,
        secrets=tuple(text for text in sealed if text is not None),
        context=context(endpoint),
        event_id=row.event_id,
        body=body_of(row.event),
        now=now,
    )


def body_of(event: WebhookEvent) -> bytes:
    """The same bytes in every attempt."""
    content = {"type": event.type, "timestamp": event.created_at.isoformat(), "data": event.data}
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def send(claimed: Claimed, client: OutboundClient, sealer: Sealer, *, total_s: float) -> Outcome:
    """One attempt. The answer's body is not read: a receiver says all with its status."""
    started = time.monotonic()
    caps = Caps(total_s=total_s, max_bytes=2**40)
    try:
        secrets = [sealer.open(text, context=claimed.context) for text in claimed.secrets]
        headers = signing.headers(claimed.event_id, claimed.body, timestamp=int(claimed.now.timestamp()), secrets=secrets)
        with client.stream("POST", claimed.url, headers=headers, content=claimed.body, caps=caps) as answer:
            retry_after_s = _retry_after_s(answer.headers.get("retry-after"), now=claimed.now)
            return Outcome(answer.status, _ms_since(started), retry_after_s=retry_after_s)
    except Unsealable:
        return Outcome(None, _ms_since(started), "secret_unreadable", "the signing secret cannot be decrypted; rotate it")
    except OutboundRefused as error:
        return Outcome(None, _ms_since(started), error.error_code, error.detail)
    except OutboundFailed as error:
        return Outcome(None, _ms_since(started), error.code, error.detail)


def keep(session: WriteSession, claimed: Claimed, outcome: Outcome, limits: DeliveryLimits) -> str | None:
    """delivered, failed, or pending until the next attempt. None: the lease was lost, and nothing is written."""
    row = session.get(WebhookDelivery, claimed.delivery_id, populate_existing=True)
    if row is None:  # its endpoint was deleted meanwhile
        return None
    now = database_time(session)
    entry = {"number": claimed.attempt, "at": claimed.now.isoformat(), "took_ms": outcome.took_ms, "status": outcome.status}
    entry |= {"error": outcome.error, "detail": outcome.detail}
    values: dict[str, Any] = {"lease_expires_at": None, "log": [*row.log, entry][-MAX_LOG:]}
    over = outcome.delivered or outcome.status == GONE or claimed.attempt >= limits.max_attempts
    if over:
        values |= {"state": DELIVERED if outcome.delivered else FAILED, "finished_at": now}
    else:
        values["available_at"] = now + dt.timedelta(seconds=pause_s(claimed.attempt, outcome, limits))
    if not repository.transition(session, delivery_id=claimed.delivery_id, fence=claimed.fence, values=values):
        return None
    if outcome.status == GONE:
        _disable(session, row, "the receiver answered 410 Gone")
    return str(values.get("state", row.state))


def _disable(session: WriteSession, row: WebhookDelivery, reason: str) -> None:
    endpoint = repository.find(session, row.tenant_id, row.endpoint_id)
    if endpoint is not None:
        endpoint.enabled, endpoint.disabled_reason = False, reason


def pause_s(attempt: int, outcome: Outcome, limits: DeliveryLimits) -> float:
    """5, 25, 125 ... seconds up to 12 hours, each with a fifth of jitter; never less than what the receiver asked for."""
    backoff_s = min(MAX_BACKOFF_S, limits.first_retry_s * BACKOFF_BASE ** (attempt - 1))
    backoff_s *= random.uniform(0.8, 1.2)  # noqa: S311 - jitter, not a secret
    return max(backoff_s, min(MAX_RETRY_AFTER_S, outcome.retry_after_s or 0.0))


def _retry_after_s(text: str | None, *, now: dt.datetime) -> float | None:
    """Seconds or an HTTP date; nonsense is no wish."""
    if text is None:
        return None
    if text.isdecimal() and text.isascii():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (moment - now).total_seconds()) if moment.tzinfo else None


def _ms_since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
