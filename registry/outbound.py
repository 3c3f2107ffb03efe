"""The one guarded HTTP client for every URL that a tenant can influence: webhooks, Hub imports.

    OutboundClient.request / .stream      redirects checked hop by hop, size and time capped, no proxies, no cookies
    outbound_transport.GuardedTransport   the same guard under an `httpx2.Client` of somebody else's library
    outbound_policy.OutboundPolicy        which URLs and addresses are allowed

A host is resolved once, every address it has is checked, and the connection is made to one of these very addresses:
nothing is looked up again, so a resolver that changes its mind (DNS rebinding) gains nothing. Host header, SNI and
certificate stay those of the name. One deadline covers everything: resolving, connecting, TLS, every read and write,
every redirect; a server that drips a byte a second cannot hold a worker.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpcore2
import httpx2

from registry.config import Settings
from registry.outbound_policy import OutboundPolicy, OutboundRefused
from registry.outbound_transport import Deadline, GuardedTransport, NoSuchHost, Resolve, TlsFailed, system_addresses

REDIRECTS = frozenset({301, 302, 303, 307, 308})
KEEPS_METHOD = frozenset({307, 308})
HEADERS_ACROSS_ORIGINS = frozenset({"accept", "range", "user-agent"})
USER_AGENT = "lorary"


class OutboundFailed(Exception):
    """The other side could not be reached or did not answer as asked.

    `code`: dns, connect, tls, timeout, protocol, too_large, redirects. `detail` may be shown to the tenant.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Caps:
    """Limits of one request, over all its hops. `total_s` counts from the start to the last byte of the body."""

    total_s: float = 15.0
    connect_s: float = 5.0
    max_bytes: int = 2**20
    max_redirects: int = 0


@dataclass(frozen=True)
class OutboundResponse:
    """A whole answer. `headers` have lower-case names; `url` is that of the last hop."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class OutboundStream:
    """An answer whose body is still to come: read it with `chunks`, inside the block that opened it."""

    def __init__(self, response: httpx2.Response, *, caps: Caps) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}
        self.url = str(response.request.url)
        self._response = response
        self._max_bytes = caps.max_bytes
        self._refuse_announced_length()

    def chunks(self) -> Iterator[bytes]:
        """The body as it travels, never decompressed. Raises OutboundFailed (too_large, timeout, protocol)."""
        received = 0
        for chunk in self._response.iter_raw():
            received += len(chunk)
            if received > self._max_bytes:
                raise self._too_large()
            yield chunk

    def _refuse_announced_length(self) -> None:
        length = self.headers.get("content-length", "")
        if self._response.request.method != "HEAD" and length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()

    def _too_large(self) -> OutboundFailed:
        return OutboundFailed("too_large", f"the answer is larger than {self._max_bytes} bytes")


class OutboundClient:
    """Sends requests that tenants asked for. Thread-safe: it holds no connection and no cookie between requests."""

    def __init__(self, policy: OutboundPolicy, *, resolve: Resolve = system_addresses, tls: ssl.SSLContext | None = None) -> None:
        self.policy = policy
        self._resolve = resolve
        self._tls = tls or ssl.create_default_context()

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, content: bytes = b"", caps: Caps | None = None
    ) -> OutboundResponse:
        """The whole answer, whatever its status. Raises OutboundRefused or OutboundFailed."""
        with self.stream(method, url, headers=headers, content=content, caps=caps) as answer:
            body = b"".join(answer.chunks())
            return OutboundResponse(answer.status, answer.headers, body, answer.url)

    @contextmanager
    def stream(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, content: bytes = b"", caps: Caps | None = None
    ) -> Iterator[OutboundStream]:
        """An answer whose body is read inside the block. Raises OutboundRefused or OutboundFailed, also while it is read."""
        caps = caps or Caps()
        sent = {"accept-encoding": "identity", "user-agent": USER_AGENT} | {name.lower(): text for name, text in (headers or {}).items()}
        hop = httpx2.Request(method, self.policy.check_url(url), headers=sent, content=content)
        with _failures(), self._transport(caps) as transport:
            for _ in range(caps.max_redirects + 1):
                response = transport.handle_request(hop)
                response.request = hop
                try:
                    if caps.max_redirects == 0 or response.status_code not in REDIRECTS or "location" not in response.headers:
                        yield OutboundStream(response, caps=caps)
                        return
                    hop = self._next_hop(hop, response, content=content)
                finally:
                    response.close()
            raise OutboundFailed("redirects", f"more than {caps.max_redirects} redirects")

    def _transport(self, caps: Caps) -> GuardedTransport:
        deadline = Deadline(caps.total_s)
        return GuardedTransport(self.policy, resolve=self._resolve, tls=self._tls, deadline=lambda: deadline, connect_s=caps.connect_s)

    def _next_hop(self, hop: httpx2.Request, response: httpx2.Response, *, content: bytes) -> httpx2.Request:
        """Checked like a first URL. Across origins nothing travels that could be a credential, and no body."""
        target = self.policy.check_url(str(hop.url.join(response.headers["location"])), field="location")
        keeps_method = response.status_code in KEEPS_METHOD or hop.method in {"GET", "HEAD"}
        same_origin = _origin(target) == _origin(hop.url)
        if hop.url.scheme == "https" and target.scheme != "https":
            raise OutboundRefused("the server redirects from https to http", field="location", remedy="name the final URL")
        if keeps_method and content and not same_origin:
            raise OutboundRefused("the server redirects a body to another origin", field="location", remedy="name the final URL")
        headers = {name: text for name, text in hop.headers.items() if _travels(name, same_origin=same_origin, with_body=keeps_method)}
        return httpx2.Request(
            hop.method if keeps_method else "GET", target, headers=headers, content=content if keeps_method and content else None
        )


def make_outbound_client(settings: Settings) -> OutboundClient:
    """Raises ValueError for an allow-list that cannot be read."""
    return OutboundClient(OutboundPolicy.parse(settings.outbound_allow_hosts, allow_http=settings.outbound_allow_http))


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _travels(name: str, *, same_origin: bool, with_body: bool) -> bool:
    if name in {"host", "content-length", "transfer-encoding"} or (not with_body and name == "content-type"):
        return False
    return same_origin or name in HEADERS_ACROSS_ORIGINS or name == "accept-encoding"


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        raise OutboundFailed(_code(error.__cause__), str(error)) from error


def _code(cause: BaseException | None) -> str:
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (NoSuchHost, "dns"),
        (TlsFailed, "tls"),
        (httpcore2.TimeoutException, "timeout"),
        (httpcore2.ConnectError, "connect"),
    )
    return next((code for kind, code in kinds if isinstance(cause, kind)), "protocol")
