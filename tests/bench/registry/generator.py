"""A closed-loop HTTP load generator small enough to share two cores with what it measures.

Each client is one keep-alive connection that sends its next request when the reply to the last one is complete.
Requests are bytes made beforehand; of a reply only the status and the length are looked at. `ceiling` says how fast that
goes against a server that does nothing, so that a reader sees what the generator itself may have cost.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import multiprocessing.synchronize
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.servers import free_ports

WARM_UP_S = 0.5


@dataclass
class Sample:
    """What one run saw: latencies in seconds of replies with the expected status, and what else came back.

    `num_replies` counts every one, the warm-up's too: what the server's processor time was spent on.
    """

    seconds: float
    latencies: list[float]
    others: Counter[str] = field(default_factory=Counter)
    num_replies: int = 0

    @property
    def per_s(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile(self, q: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("inf")

    @property
    def median(self) -> float:
        return statistics.median(self.latencies) if self.latencies else float("inf")


def request(method: str, path: str, *, port: int, token: str = "", body: Any = None, **headers: str) -> bytes:
    """One HTTP/1.1 request, ready to be sent."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Accept: */*"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


class _Client(asyncio.Protocol):
    """One connection. Counts replies that complete between `opens_at` and `closes_at`."""

    def __init__(self, requests: Iterator[bytes], *, status: int, sample: Sample, opens_at: float, done: asyncio.Future[None]) -> None:
        self._requests = requests
        self._status = str(status).encode()
        self._sample = sample
        self._opens_at = opens_at
        self._closes_at = opens_at + sample.seconds
        self._done = done
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0 or not _is_complete(self._received, head_end):
            return
        now = time.perf_counter()
        self._sample.num_replies += 1
        status, self._received = self._received[9:12], b""
        if self._opens_at <= self._sent_at and now < self._closes_at:
            if status == self._status:
                self._sample.latencies.append(now - self._sent_at)
            else:
                self._sample.others[status.decode()] += 1
        if now < self._closes_at:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if time.perf_counter() < self._closes_at:
            self._sample.others["connection lost"] += 1
        if not self._done.done():
            self._done.set_result(None)


def _is_complete(received: bytes, head_end: int) -> bool:
    head = received[:head_end].lower()
    at = head.find(b"content-length:")
    if at >= 0:
        line = head[at + 15 :].partition(b"\r\n")[0]
        return len(received) >= head_end + 4 + int(line)
    if b"transfer-encoding: chunked" in head:
        return received.endswith(b"0\r\n\r\n")
    return True


def measure(clients: Sequence[Iterator[bytes]], *, port: int, status: int, seconds: float) -> Sample:
    """`clients` at once for `seconds`, after a warm-up that is not counted."""
    return asyncio.run(_measure(clients, port=port, status=status, seconds=seconds))


async def _measure(clients: Sequence[Iterator[bytes]], *, port: int, status: int, seconds: float) -> Sample:
    loop, sample = asyncio.get_running_loop(), Sample(seconds, [])
    opens_at = time.perf_counter() + WARM_UP_S
    futures = [loop.create_future() for _ in clients]
    for requests, done in zip(clients, futures, strict=True):
        client = _Client(requests, status=status, sample=sample, opens_at=opens_at, done=done)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*futures)
    return sample


# ---- the generator's own ceiling ----


class _Nothing(asyncio.Protocol):
    """Answers every read with the same small reply."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n" + b"x" * 500)  # type: ignore[attr-defined]


def _serve_nothing(port: int, ready: multiprocessing.synchronize.Event) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Nothing, "127.0.0.1", port)
        ready.set()
        await server.serve_forever()

    asyncio.run(serve())


def ceiling(*, clients: int, seconds: float = 2.0) -> float:
    """Operations a second against a server that does nothing, in a process of its own."""
    context, port = multiprocessing.get_context("spawn"), free_ports(1)[0]
    ready = context.Event()
    server = context.Process(target=_serve_nothing, args=(port, ready), daemon=True)
    server.start()
    try:
        assert ready.wait(60), "the empty server did not start"
        same = request("GET", "/", port=port)
        return measure([iter(lambda: same, None) for _ in range(clients)], port=port, status=200, seconds=seconds).per_s
    finally:
        server.kill()
        server.join()
