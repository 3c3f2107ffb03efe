"""Connections to addresses that were checked: `GuardedTransport`, for our own client and for other libraries' `httpx2.Client`.

The guard sits below HTTP, where the socket is opened: whoever decides about URLs above it cannot go around it.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import httpcore2
import httpx2

from registry.outbound_policy import Address, OutboundPolicy

Resolve = Callable[[str, int], Sequence[str]]


class NoSuchHost(httpcore2.ConnectError):
    """The resolver knows no address."""


class TlsFailed(httpcore2.ConnectError):
    """No TLS, or a certificate that is not the host's."""


class Deadline:
    """A moment that no wait may pass."""

    def __init__(self, total_s: float) -> None:
        self._total_s = total_s
        self._at = time.monotonic() + total_s

    def left(self, at_most: float | None = None) -> float:
        """Seconds until then, and no more than `at_most`. Raises httpcore2.ReadTimeout when it has passed."""
        left_s = self._at - time.monotonic()
        if left_s <= 0:
            raise httpcore2.ReadTimeout(f"no complete answer within {self._total_s:g} s")
        return left_s if at_most is None else min(left_s, at_most)


def system_addresses(host: str, port: int) -> list[str]:
    """What the system's resolver says, in its order."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


_TRANSLATIONS: tuple[tuple[type[Exception], type[httpx2.TransportError]], ...] = (
    (httpcore2.ConnectTimeout, httpx2.ConnectTimeout),
    (httpcore2.WriteTimeout, httpx2.WriteTimeout),
    (httpcore2.TimeoutException, httpx2.ReadTimeout),
    (httpcore2.ConnectError, httpx2.ConnectError),
    (httpcore2.NetworkError, httpx2.ReadError),
    (httpcore2.LocalProtocolError, httpx2.LocalProtocolError),
    (httpcore2.ProtocolError, httpx2.RemoteProtocolError),
)


@contextmanager
def _translated() -> Iterator[None]:
    """Errors of the lower library as those that callers of an `httpx2` transport expect; the cause stays."""
    try:
        yield
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        kind = next(ours for theirs, ours in _TRANSLATIONS if isinstance(error, theirs))
        raise kind(str(error)) from error


class GuardedTransport(httpx2.BaseTransport):
    """Each request is checked against `policy`, on a connection of its own, within one deadline a connection.

    Under `httpx2.Client(transport=..., trust_env=False)` each redirect comes back here and is checked too.
    """

    def __init__(
        self,
        policy: OutboundPolicy,
        *,
        deadline: Callable[[], Deadline],
        resolve: Resolve = system_addresses,
        tls: ssl.SSLContext | None = None,
        connect_s: float = 5.0,
    ) -> None:
        self._policy = policy
        backend = _GuardedBackend(policy, resolve=resolve, deadline=deadline, connect_s=connect_s)
        tls = tls or ssl.create_default_context()
        self._pool = httpcore2.ConnectionPool(ssl_context=tls, max_keepalive_connections=0, network_backend=backend)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = self._policy.check_url(str(request.url))
        assert isinstance(request.stream, httpx2.SyncByteStream), "an async body under the sync transport"
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = httpcore2.Request(request.method, target, headers=request.headers.raw, content=request.stream)
        with _translated():
            answer = self._pool.handle_request(sent)
        return httpx2.Response(answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions)

    def close(self) -> None:
        self._pool.close()


class _Body(httpx2.SyncByteStream):
    def __init__(self, answer: httpcore2.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        with _translated():
            yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


@dataclass
class _Resolution:
    """One look-up in a thread: the system's resolver has no deadline of its own."""

    found: Sequence[str] = ()
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def run(self, resolve: Resolve, host: str, port: int) -> None:
        try:
            self.found = resolve(host, port)
        except (OSError, UnicodeError) as error:
            self.error = error
        finally:
            self.done.set()


class _GuardedBackend(httpcore2.NetworkBackend):
    """Resolve once, check every address, connect to one of them."""

    def __init__(self, policy: OutboundPolicy, *, resolve: Resolve, deadline: Callable[[], Deadline], connect_s: float) -> None:
        self._policy = policy
        self._resolve = resolve
        self._deadline = deadline
        self._connect_s = connect_s

    def connect_tcp(  # the signature is httpcore2's
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore2.NetworkStream:
        deadline = self._deadline()
        addresses = self._addresses(host, port, deadline=deadline)
        for address in addresses:  # all of them before the first connection: a name with one foot inside is not trusted
            self._policy.check_address(host, address)
        failure: OSError | None = None
        for address in addresses:
            try:
                connected = socket.create_connection((str(address), port), timeout=deadline.left(self._connect_s))
            except OSError as error:
                failure = error
                continue
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _DeadlineStream(connected, deadline=deadline)
        if isinstance(failure, TimeoutError):
            raise httpcore2.ConnectTimeout("no connection in time") from failure
        raise httpcore2.ConnectError("nobody accepts connections there") from failure

    def _addresses(self, host: str, port: int, *, deadline: Deadline) -> list[Address]:
        resolution = _Resolution()
        threading.Thread(target=resolution.run, args=(self._resolve, host, port), name="resolve", daemon=True).start()
        if not resolution.done.wait(deadline.left()):
            raise httpcore2.ConnectTimeout("the resolver did not answer in time")
        if resolution.error is not None or not resolution.found:
            raise NoSuchHost(f"the host {host!r:.100} has no address") from resolution.error
        return [ip_address(text) for text in dict.fromkeys(resolution.found)]


class _DeadlineStream(httpcore2.NetworkStream):
    """A socket on which every wait ends at the deadline."""

    def __init__(self, connected: socket.socket, *, deadline: Deadline) -> None:
        self._socket = connected
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._socket.settimeout(self._deadline.left(timeout))
        try:
            return self._socket.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore2.ReadTimeout("the answer did not come in time") from error
        except OSError as error:
            raise httpcore2.ReadError("the connection broke") from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._socket.settimeout(self._deadline.left(timeout))
        try:
            self._socket.sendall(buffer)  # its timeout is for all of it
        except TimeoutError as error:
            raise httpcore2.WriteTimeout("the request was not taken in time") from error
        except OSError as error:
            raise httpcore2.WriteError("the connection broke") from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        self._socket.settimeout(self._deadline.left(timeout))
        try:
            secured = ssl_context.wrap_socket(self._socket, server_hostname=server_hostname)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout("TLS was not set up in time") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or type(error).__name__
            raise TlsFailed(f"TLS could not be set up: {reason}") from error
        return _DeadlineStream(secured, deadline=self._deadline)

    def close(self) -> None:
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        return self._socket if info == "socket" else None
