"""Two pure ASGI layers around the application: request ids with access logs, and the limit on request bodies.

Neither buffers: replies and uploads stream through message by message.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry import metrics
from registry.audit.source import coming_from
from registry.errors import TooLarge
from registry.problems import render
from registry.wire import CLIENT_REQUEST_ID_HEADER, REQUEST_ID_HEADER

log = structlog.get_logger("registry.access")

STREAMED_PREFIXES = ("/api/v1/blobs/", "/api/v1/uploads/")
MAX_CLIENT_ID = 128
_PROBES = frozenset({"/livez", "/readyz"})


class RequestContext:
    """Gives every request an id of ours, in the logs, in `request.state.request_id` and in the reply's header.

    A client's own X-Request-Id is logged beside it and comes back as X-Client-Request-Id, but is not adopted: grants are accepted
    once by request id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        client_id = _client_request_id(scope)
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                if client_id is not None:
                    headers[CLIENT_REQUEST_ID_HEADER] = client_id
            await send(message)

        started = time.perf_counter()
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            coming_from(_address(scope), user_agent=Headers(scope=scope).get("user-agent")),
            metrics.http_in_flight.track_inprogress(),
        ):
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                duration_s = time.perf_counter() - started
                _log_access(scope, status=status, duration_s=duration_s)
                _count(scope, status=status, duration_s=duration_s)


def _count(scope: Scope, *, status: int, duration_s: float) -> None:
    method, route = metrics.among(scope["method"], metrics.HTTP_METHODS), route_of(scope)
    metrics.http_requests.labels(method, route, str(status)).inc()
    metrics.http_seconds.labels(method, route).observe(duration_s)


def route_of(scope: Scope) -> str:
    """The template that took the request, as the OpenAPI document spells it; `unmatched` where none did."""
    included = scope.get("fastapi", {}).get("effective_route_context")  # knows the prefixes, which the route itself does not
    return str(getattr(included or scope.get("route"), "path_format", "unmatched"))


def _client_request_id(scope: Scope) -> str | None:
    """What the caller sent as X-Request-Id, where it is short printable ASCII; anything else is nobody's id."""
    given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return given if 0 < len(given) <= MAX_CLIENT_ID and given.isascii() and given.isprintable() else None


def _address(scope: Scope) -> str | None:
    """The client's, or the proxy's where that is not trusted (`ProxyHeadersMiddleware` has put the right one there)."""
    return scope["client"][0] if scope.get("client") else None


def _log_access(scope: Scope, *, status: int, duration_s: float) -> None:
    if scope["path"] in _PROBES and status < 500:
        return
    subject = scope["state"].get("subject")
    fields: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": status, "duration_s": round(duration_s, 6)}
    fields["address"] = _address(scope)
    if subject is not None:
        fields |= {"key_id": subject.key_id, "tenant": subject.tenant}
    client_id = _client_request_id(scope)
    if client_id is not None:
        fields["client_request_id"] = client_id
    log.info("http.request", **fields)


class BodyLimit:
    """Refuses bodies above `max_bytes` with 413, by Content-Length at once or at the first byte too many.

    PUT of a blob or of a part of one is left alone: it streams, and has its own limit.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] == "PUT" and scope["path"].startswith(STREAMED_PREFIXES)):
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await render(Request(scope), self._refusal())(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                # FastAPI turns other exceptions met while it reads a body into 400; this one it lets pass.
                raise HTTPException(TooLarge.status, self._refusal().detail)
            return message

        await self.app(scope, receive_limited, send)

    def _refusal(self) -> TooLarge:
        return TooLarge(
            f"the request body is larger than {self.max_bytes} bytes",
            field="body",
            remedy="send weights with PUT /api/v1/blobs/{sha256}; everything else is small",
        )
