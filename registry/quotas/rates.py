"""Requests and tokens a minute: reserved when a request is authorised, settled when it is known what it used.

A minute is one of the database's clock. Its row holds the requests that were let in, and the sum of what each used, or
reserved as long as it is not settled. One statement decides and reserves, so many at once never exceed a limit. What
is settled after its minute changes nothing any more: a reservation that nobody settles ends with its minute.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.db import ReadSession, WriteSession
from registry.errors import RateLimited
from registry.quotas import repository
from registry.quotas.repository import Minute
from registry.quotas.schemas import Measure
from registry.quotas.service import measure

WINDOW_S = 60


@dataclass(frozen=True)
class RateLimits:
    """None: no limit."""

    requests: int | None
    tokens: int | None

    @property
    def any(self) -> bool:
        return self.requests is not None or self.tokens is not None


@dataclass(frozen=True)
class Reservation:
    """What one request holds of a minute; `tokens` until it is settled."""

    tenant_id: str
    minute: int
    tokens: int
    headers: dict[str, str]


class RateExceeded(RateLimited):
    """With the headers that a well-meaning client reads."""

    def __init__(self, detail: str, *, field: str, code: str, remedy: str, retry_after_s: int | None, rates: dict[str, str]) -> None:
        super().__init__(detail, field=field, code=code, remedy=remedy, retry_after_s=retry_after_s)
        self.rates = rates

    def headers(self) -> dict[str, str]:
        return super().headers() | self.rates


def reserve(session: WriteSession, tenant_id: str, limits: RateLimits, *, tokens: int) -> Reservation:
    """One request and so many tokens of this minute. Raises RateExceeded. One statement where there is room."""
    _refuse_hopeless(limits, tokens)
    now = repository.reserve(session, tenant_id, tokens=tokens, max_requests=limits.requests, max_tokens=limits.tokens)
    if now is None:
        raise _exceeded(limits, repository.minute_of(session, tenant_id), tokens)
    return Reservation(tenant_id, now.minute, tokens, rate_headers(limits, now))


def settle(session: WriteSession, tenant_id: str, *, minute: int, difference: int) -> None:
    """Requests of `minute` used `difference` more tokens than they had reserved (less: negative)."""
    if difference:
        repository.settle(session, tenant_id, minute=minute, difference=difference)


def release(session: WriteSession, reservation: Reservation) -> None:
    """Nobody began on the request: it used no tokens. That it was made still counts."""
    settle(session, reservation.tenant_id, minute=reservation.minute, difference=-reservation.tokens)


def rate_headers(limits: RateLimits, now: Minute) -> dict[str, str]:
    """RateLimit and RateLimit-Policy of draft-ietf-httpapi-ratelimit-headers-10: quota and window, what remains and for how long."""
    left = {"requests": (limits.requests, now.requests), "tokens": (limits.tokens, now.tokens)}
    known = {name: (limit, max(0, limit - used)) for name, (limit, used) in left.items() if limit is not None}
    return {
        "RateLimit-Policy": ", ".join(f'"{name}";q={limit};w={WINDOW_S}' for name, (limit, _) in known.items()),
        "RateLimit": ", ".join(f'"{name}";r={remaining};t={now.reset_s}' for name, (_, remaining) in known.items()),
    }


def _refuse_hopeless(limits: RateLimits, tokens: int) -> None:
    """What no minute will ever have room for."""
    full = rate_headers(limits, Minute(minute=0, requests=0, tokens=0, reset_s=WINDOW_S))
    for name, limit in (("requests", limits.requests), ("tokens", limits.tokens)):
        if limit == 0:
            raise RateExceeded(
                f"this tenant may use no {name}",
                field=name,
                code="insufficient_quota",
                remedy="ask the operator for a quota",
                retry_after_s=None,
                rates=full,
            )
    if limits.tokens is not None and tokens > limits.tokens:
        raise RateExceeded(
            f"this request may use about {tokens} tokens, and this tenant has {limits.tokens} a minute",
            field="tokens",
            code="rate_limit_exceeded",
            remedy="send a smaller max_tokens or a shorter prompt",
            retry_after_s=None,
            rates=full,
        )


def _exceeded(limits: RateLimits, now: Minute, tokens: int) -> RateExceeded:
    name, limit, used = "tokens", limits.tokens, now.tokens
    if limits.requests is not None and now.requests >= limits.requests:
        name, limit, used = "requests", limits.requests, now.requests
    asked = f"; this request may use about {tokens}" if name == "tokens" else ""
    return RateExceeded(
        f"this tenant has {limit} {name} a minute and {used} are used or reserved{asked}; wait {now.reset_s} s",
        field=name,
        code="rate_limit_exceeded",
        remedy="wait as long as Retry-After says, then send it again",
        retry_after_s=now.reset_s,
        rates=rate_headers(limits, now),
    )


def _requests_now(session: ReadSession, tenant_id: str) -> int:
    return repository.minute_of(session, tenant_id).requests


def _tokens_now(session: ReadSession, tenant_id: str) -> int:
    return max(0, repository.minute_of(session, tenant_id).tokens)


measure(Measure.REQUESTS, _requests_now)
measure(Measure.TOKENS, _tokens_now)
