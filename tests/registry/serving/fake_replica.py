"""A stand-in for a replica, on a real socket: does what the request's `behave` says, and remembers what it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.registry.serving.conftest import serving

EVENTS = [b'data: {"n": 0}\n\n', b'data: {"n": 1}\n\n', b"data: [DONE]\n\n"]


@dataclass
class FakeReplica:
    """`requests`: (path, headers, body) in order. `go` lets a waiting answer go on; `cancelled` says that a client left."""

    url: str = ""
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        self.requests.clear()
        self.go.clear()
        self.cancelled.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        asked = json.loads(body)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((scope["path"], headers, asked))
        await getattr(self, "_" + asked.get("behave", "answer"))(receive, send)

    async def _answer(self, receive: Any, send: Any, *, status: int = 200) -> None:
        body = json.dumps({"status": status}).encode()
        headers = [(b"content-type", b"application/json"), (b"x-secret", b"inside"), (b"connection", b"keep-alive"), (b"retry-after", b"7")]
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def _bad_request(self, receive: Any, send: Any) -> None:
        await self._answer(receive, send, status=400)

    async def _refuse_grant(self, receive: Any, send: Any) -> None:
        await self._answer(receive, send, status=401)

    async def _busy(self, receive: Any, send: Any) -> None:
        await self._answer(receive, send, status=503)

    async def _start_stream(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})

    async def _stream(self, receive: Any, send: Any) -> None:
        """One event, then waits for `go`, then the rest."""
        await self._start_stream(send)
        await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
        await self._until_go_or_gone(receive)
        for event in EVENTS[1:]:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _break(self, receive: Any, send: Any) -> None:
        """One event and a half, then the connection goes."""
        await self._start_stream(send)
        await send({"type": "http.response.body", "body": EVENTS[0] + EVENTS[1][:7], "more_body": True})
        await asyncio.sleep(0.05)
        raise RuntimeError("the replica dies here")

    async def _break_whole(self, receive: Any, send: Any) -> None:
        """Dies in the middle of an answer that is no stream."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"half":', "more_body": True})
        raise RuntimeError("the replica dies here")

    async def _die(self, receive: Any, send: Any) -> None:
        """Takes the request and never answers it: uvicorn's own 500 would be an answer, so the transport is cut."""
        send.__self__.transport.abort()

    async def _think(self, receive: Any, send: Any) -> None:
        """Says nothing until `go`."""
        await self._until_go_or_gone(receive)
        await self._answer(receive, send)

    async def _until_go_or_gone(self, receive: Any) -> None:
        gone = asyncio.ensure_future(receive())
        while not self.go.is_set():
            if gone.done():
                self.cancelled.set()
                raise asyncio.CancelledError
            await asyncio.sleep(0.005)
        gone.cancel()


@contextlib.contextmanager
def fake_replica() -> Iterator[FakeReplica]:
    replica = FakeReplica()
    with serving(replica) as replica.url:
        yield replica
        replica.go.set()
