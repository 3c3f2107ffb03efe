"""The front door: authorise, choose a replica, grant, relay. Authorised anew for every request; no session while it runs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import structlog
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from opentelemetry.trace import SpanKind
from starlette.responses import Response

from registry import metrics, tracing
from registry.config import Settings
from registry.db import Database
from registry.errors import BadRequest, Unavailable
from registry.quotas import rates
from registry.quotas.rates import Reservation
from registry.serving import service
from registry.serving.demand import tokens_wanted
from registry.serving.grants import GrantSigner, signer_for
from registry.serving.proxy import (
    EVENT_STREAM,
    FORWARDED_REQUEST_HEADERS,
    FORWARDED_RESPONSE_HEADERS,
    RETRY_AFTER_S,
    ClientGone,
    RelayedStream,
    forwarded,
    replica_failed,
    while_connected,
)
from registry.serving.repository import Address
from registry.serving.service import Authorised
from registry.tenants.auth import TenantSubject
from registry.wire import FORM_DIGEST_HEADER, GRANT_HEADER, REQUEST_ID_HEADER, VERSION_DIGEST_HEADER

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 2  # replicas that a request is offered to; the second only where the first has not begun on it
POLL_S = 0.2
UNAVAILABLE = 503
NOT_RELAYED = frozenset({"no_replica", "replica_failed"})
CLIENT_CLOSED = 499  # nginx's; nobody is there to read it, the access log is


@dataclass(frozen=True)
class FrontDoor:
    """What relaying needs of the application."""

    database: Database
    settings: Settings
    signer: GrantSigner
    client: httpx2.AsyncClient

    @classmethod
    def of(cls, request: Request) -> FrontDoor:
        state = request.app.state
        return cls(state.database, state.settings, signer_for(state.settings.secret_key.get_secret_value()), state.http)

    async def relay(self, request: Request, subject: TenantSubject, *, path: str) -> Response:
        """The answer of a live replica to this request, streamed if the replica streams."""
        body = await request.body()
        asked = asked_of(body)
        order = Order(subject=subject, model=model_of(asked), asked=asked, path=path, body=body, headers=self._headers(request))
        outcome = "refused"
        try:
            response = await while_connected(request.receive, self._answer(order))
            outcome = "relayed"
            return response
        except Unavailable as error:
            outcome = metrics.among(error.error_code, NOT_RELAYED)
            raise
        except ClientGone:
            outcome = "client_left"
            log.info("client.left")
            return Response(status_code=CLIENT_CLOSED)
        finally:
            metrics.relays.labels(outcome).inc()

    def _headers(self, request: Request) -> dict[str, str]:
        kept = forwarded(request.headers, FORWARDED_REQUEST_HEADERS)
        return {**kept, "accept-encoding": "identity", REQUEST_ID_HEADER: request.state.request_id}

    async def _answer(self, order: Order) -> Response:
        taken = await self._send_to_a_replica(order)
        upstream = taken.upstream
        headers = {**forwarded(upstream.headers, FORWARDED_RESPONSE_HEADERS), **taken.headers()}
        if upstream.headers.get("content-type", "").startswith(EVENT_STREAM):
            return RelayedStream(upstream, headers=headers)
        try:
            content = await upstream.aread()
        except httpx2.TransportError as error:
            log.warning("replica.failed", reason=f"{type(error).__name__}: {error}")
            raise replica_failed() from error
        finally:
            await upstream.aclose()
        return Response(content, status_code=upstream.status_code, headers=headers)

    async def _send_to_a_replica(self, order: Order) -> Taken:
        """Authorises before each look for a replica, so that what is deleted while a request waits is not served.

        A replica that turned the request away with 503 has not begun on it, so another may be asked; where none takes
        it, that 503 is the answer, and the tokens that were reserved are given back: no replica will report it.
        """
        deadline = time.monotonic() + self.settings.replica_wait_s
        tried: list[str] = []
        busy: httpx2.Response | None = None
        reservation: Reservation | None = None
        while True:
            authorised, address, reservation = await run_in_threadpool(self._look_up, order, reservation, tried=tried)
            if address is not None and len(tried) < MAX_ATTEMPTS:
                upstream = await self._offer(order, authorised, address, reservation)
                if upstream is not None and upstream.status_code != UNAVAILABLE:
                    return Taken(upstream, authorised, reservation)
                busy = upstream or busy
                tried.append(address.replica_id)
            elif busy is not None or tried or time.monotonic() >= deadline:
                await run_in_threadpool(self._release, reservation)
                if busy is None:
                    raise no_replica(authorised)
                return Taken(busy, authorised, reservation)
            else:
                await asyncio.sleep(POLL_S)

    def _look_up(
        self, order: Order, reservation: Reservation | None, *, tried: Collection[str]
    ) -> tuple[Authorised, Address | None, Reservation | None]:
        """Raises NotFound and, where the tenant's minute is used up, RateExceeded."""
        with metrics.authorisation_seconds.time():
            with self.database.read() as session:
                authorised = service.authorise(session, order.subject, order.model)
                address = service.choose_replica(session, authorised, ttl_s=self.settings.replica_ttl_s, tried=tried)
            return authorised, address, reservation or self._reserve(order, authorised)

    def _reserve(self, order: Order, authorised: Authorised) -> Reservation | None:
        """Once a request. Nothing, and no statement, for a tenant without limits."""
        limits = service.rate_limits(authorised, self.settings)
        if not limits.any:
            return None
        tokens = tokens_wanted(order.asked, limit=limits.tokens)
        with self.database.write() as session:
            return rates.reserve(session, order.subject.tenant_id, limits, tokens=tokens)

    def _release(self, reservation: Reservation | None) -> None:
        if reservation is not None:
            with self.database.write() as session:
                rates.release(session, reservation)

    async def _offer(
        self, order: Order, authorised: Authorised, address: Address, reservation: Reservation | None
    ) -> httpx2.Response | None:
        """The replica's response, its body unread; None if it could not even be connected to. The replica goes on with our trace."""
        with tracing.span("replica.offer", kind=SpanKind.CLIENT, attributes={"lorary.replica.id": address.replica_id}) as span:
            upstream = await self._ask(order, authorised, address, reservation)
            if upstream is None:
                tracing.fail_span(span, "unreachable")
            else:
                span.set_attribute("http.response.status_code", upstream.status_code)
            return upstream

    async def _ask(self, order: Order, authorised: Authorised, address: Address, reservation: Reservation | None) -> httpx2.Response | None:
        traceparent = tracing.current_traceparent()
        traced = {} if traceparent is None else {tracing.TRACEPARENT: traceparent}
        grant = service.grant_for(
            authorised,
            address,
            request_id=order.headers[REQUEST_ID_HEADER],
            key_id=order.subject.key_id,
            reservation=reservation,
            signer=self.signer,
            settings=self.settings,
        )
        metrics.grants.inc()
        headers = {**order.headers, **traced, GRANT_HEADER: grant}
        request = self.client.build_request("POST", address.url + order.path, content=order.body, headers=headers)
        try:
            upstream = await self.client.send(request, stream=True)
            if upstream.status_code == UNAVAILABLE:
                await upstream.aread()  # kept for the client in case nobody else takes the request; frees the connection
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            log.warning("replica.unreachable", replica_id=address.replica_id, url=address.url, reason=type(error).__name__)
            return None
        except httpx2.TransportError as error:
            log.warning("replica.failed", replica_id=address.replica_id, reason=f"{type(error).__name__}: {error}")
            raise replica_failed() from error
        if upstream.status_code in (401, 403):
            # Our grant was refused. That is between us and the replica: the client's key is good, and 401 would say it is not.
            log.error("replica.refused_grant", replica_id=address.replica_id, status=upstream.status_code)
            await upstream.aclose()
            raise replica_failed()
        return upstream


def no_replica(authorised: Authorised) -> Unavailable:
    return Unavailable(
        f"no live replica serves {authorised.served.base_model} now",
        code="no_replica",
        retry_after_s=RETRY_AFTER_S,
        remedy="try again soon",
    )


@dataclass(frozen=True)
class Order:
    """One request of a client, as it goes to whichever replica takes it. `headers` lack the grant."""

    subject: TenantSubject
    model: str
    asked: Mapping[str, Any]
    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Taken:
    """A replica's answer, its body unread, and what the front door itself has to say with it."""

    upstream: httpx2.Response
    authorised: Authorised
    reservation: Reservation | None

    def headers(self) -> dict[str, str]:
        return digest_headers(self.authorised) | ({} if self.reservation is None else self.reservation.headers)


def asked_of(body: bytes) -> Mapping[str, Any]:
    """An OpenAI request as it was sent. Raises BadRequest for what is no JSON."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is not JSON", code="invalid_json", field="body", remedy="send one JSON object") from error
    return request if isinstance(request, dict) else {}


def model_of(asked: Mapping[str, Any]) -> str:
    """The `model` of an OpenAI request. Everything else in it is for the replica to judge."""
    model = asked.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest(
            "model is missing or not a string", code="missing_model", field="model", value=model, remedy="name a model of `GET /v1/models`"
        )
    return model


def digest_headers(authorised: Authorised) -> dict[str, str]:
    """What the name meant when this request was admitted. The base model has neither digest."""
    found = {VERSION_DIGEST_HEADER: authorised.served.version_digest, FORM_DIGEST_HEADER: authorised.served.form_digest}
    return {name: digest for name, digest in found.items() if digest is not None}
