"""Streaming one replica's answer through to one client, and stopping the replica when the client leaves.

Nothing of the client's request but its body and three headers reaches a replica, and nothing of a replica's answer
but its body and three headers reaches a client: both lists are written out here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import httpx2
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from registry.errors import Unavailable
from registry.wire import DEADLINE_HEADER

log = structlog.get_logger(__name__)

FORWARDED_REQUEST_HEADERS = ("content-type", "accept", DEADLINE_HEADER.lower())
FORWARDED_RESPONSE_HEADERS = ("content-type", "cache-control", "retry-after")
EVENT_STREAM = "text/event-stream"
MAX_EVENT_BYTES = 8 << 20
RETRY_AFTER_S = 2

# Generation may be silent for long (queue, prefill, a whole answer without streaming); a dead peer is noticed by TCP.
TIMEOUT = httpx2.Timeout(connect=2.0, read=600.0, write=30.0, pool=5.0)
# No connection is used twice: whether a kept one had died is only learned after a request was risked on it, and
# generation must not be sent twice. Connecting costs a round trip beside seconds of tokens.
LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=0)

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


def make_client() -> httpx2.AsyncClient:
    """The client for everything that goes to replicas. One a process."""
    return httpx2.AsyncClient(timeout=TIMEOUT, limits=LIMITS, trust_env=False, follow_redirects=False)


def forwarded(headers: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientGone if the client leaves first. The request's body is read by then."""
    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class RelayedStream(Response):
    """Server-sent events of a replica, event by event as they come. Owns `upstream` and closes it however this ends.

    Only whole events are passed on, so that an answer that breaks off can still end with an error event that a client
    can read.
    """

    def __init__(self, upstream: httpx2.Response, *, headers: Mapping[str, str]) -> None:
        self.upstream = upstream
        self.status_code = upstream.status_code
        self.background = None
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        try:
            await while_connected(receive, self._pump(send))
        except ClientGone:
            log.info("client.left")
        finally:
            await self.upstream.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for events in whole_events(self.upstream.aiter_raw()):
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except (httpx2.TransportError, EventTooLarge) as error:
            log.warning("replica.failed_midstream", reason=f"{type(error).__name__}: {error}")
            await send({"type": "http.response.body", "body": error_event(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventTooLarge(Exception):
    """A replica sent MAX_EVENT_BYTES without ending its event."""


async def whole_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, cut only between events (an empty line); what stands after the last one is passed on at the end."""
    rest = b""
    async for chunk in chunks:
        complete, boundary, rest = (rest + chunk).rpartition(b"\n\n")
        if boundary:
            yield complete + boundary
        if len(rest) > MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event of more than {MAX_EVENT_BYTES} bytes")
    if rest:
        yield rest


def replica_failed() -> Unavailable:
    return Unavailable(
        "the replica that was answering failed; nothing more will come of this request",
        code="replica_failed",
        retry_after_s=RETRY_AFTER_S,
        remedy="send the request again",
    )


def error_event() -> bytes:
    """How a stream that has begun ends with an error: openai's clients raise APIError on it."""
    return b"data: " + json.dumps(replica_failed().openai(), separators=(",", ":")).encode() + b"\n\n"
