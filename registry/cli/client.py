"""The HTTP client of `/api/v1`: one connection, problems turned into sentences, listings followed to their end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx2

from registry.cli.failure import CliFailure
from registry.wire import REQUEST_ID_HEADER, TENANT_HEADER

IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
MAX_TRIES = 4
MAX_RETRY_WAIT_S = 10.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

Json = dict[str, Any]
Param = str | int | Sequence[str]
T = TypeVar("T")


class ApiProblem(CliFailure):
    """The registry answered with an error; `status` and `code` tell which, `problem` is its whole body."""

    def __init__(self, status: int, problem: Mapping[str, Any], *, what: str) -> None:
        detail = str(problem.get("detail") or problem.get("title") or f"{what} answered {status}")
        remedy = problem.get("remedy")
        super().__init__(
            detail,
            remedy=None if remedy is None else str(remedy),
            code=problem.get("code"),
            status=status,
            field=problem.get("field"),
            value=problem.get("value"),
        )
        self.status = status
        self.code = str(problem.get("code", ""))
        self.problem = dict(problem)


def path(*parts: str | int) -> str:
    """`path("adapters", "a b", "versions", 3)` is `/adapters/a%20b/versions/3`: a name never changes the route."""
    return "".join("/" + quote(str(part), safe="") for part in parts)


class RegistryClient:
    """Speaks to one registry as one key, and for an admin key in one tenant.

    `request_id` is what the registry's log calls the client's. Every method raises ApiProblem for an error answer and CliFailure
    when the registry cannot be reached.
    """

    def __init__(
        self, url: str, *, token: str | None = None, tenant: str | None = None, timeout_s: float = 60.0, request_id: str = ""
    ) -> None:
        self.url = url.rstrip("/")
        headers = {"Accept": "application/json"} | ({REQUEST_ID_HEADER: request_id} if request_id else {})
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if tenant:
            headers[TENANT_HEADER] = tenant
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout_s, connect=5.0),
            trust_env=urlsplit(url).hostname not in LOOPBACK,  # a proxy has no business between us and this machine
        )

        self._store = httpx2.Client(timeout=httpx2.Timeout(timeout_s, connect=5.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        self._store.close()

    def get(self, route: str, **params: Param) -> Json:
        return self._json("GET", route, params=params)

    def list(self, route: str) -> list[Json]:
        """A short listing, which comes whole."""
        return [dict(item) for item in self._parsed(self.request("GET", route), kind=list)]

    def text(self, route: str, **params: str | int) -> str:
        """An answer that is no JSON."""
        return self.request("GET", route, params=params).text

    def post(self, route: str, body: Mapping[str, Any]) -> Json:
        return self._json("POST", route, json=dict(body))

    def put(self, route: str, body: Mapping[str, Any], *, headers: Mapping[str, str]) -> Json:
        return self._json("PUT", route, json=dict(body), headers=dict(headers))

    def patch(self, route: str, body: Mapping[str, Any]) -> Json:
        return self._json("PATCH", route, json=dict(body))

    def delete(self, route: str, *, headers: Mapping[str, str] | None = None) -> None:
        self.request("DELETE", route, headers=dict(headers or {}))

    def pages(self, route: str, **params: Param) -> Iterator[Json]:
        """Every item of a listing, page after page."""
        while True:
            page = self.get(route, **params)
            yield from page["items"]
            if not page.get("next_cursor"):
                return
            params["cursor"] = page["next_cursor"]

    def exists(self, route: str) -> bool:
        try:
            self.request("HEAD", route)
        except ApiProblem as problem:
            if problem.status == 404:
                return False
            raise
        return True

    def upload(self, route: str, chunks: Iterable[bytes], *, size: int) -> Json:
        """PUT a body of known size as it is read; tried once, for the bytes are gone after that."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        return self._decode(self._send("PUT", route, content=chunks, headers=headers))

    def put_part(self, url: str, data: bytes) -> None:
        """PUT one part of a large upload. A URL of the store carries its own right and must not see the key."""
        try:
            response = self._http.put(self.url + url, content=data) if url.startswith("/") else self._store.put(url, content=data)
        except httpx2.TransportError as error:
            raise PartFailed(str(error) or type(error).__name__) from error
        if response.status_code >= 500 or response.status_code in {403, 404, 408, 429}:
            raise PartFailed(f"{response.status_code} {response.reason_phrase}")
        if response.is_error:
            raise _problem(response)

    @contextmanager
    def download(self, route: str, **params: str | Sequence[str]) -> Iterator[Iterator[bytes]]:
        """The body of a GET, in chunks."""
        with (
            self._reaching(),
            self._http.stream(
                "GET", self._full(route), params=params, headers={"Accept": "*/*", "Accept-Encoding": "identity"}, follow_redirects=True
            ) as response,
        ):
            if response.is_error:
                response.read()
                raise _problem(response)
            yield response.iter_bytes(chunk_size=2**20)

    @contextmanager
    def lines(self, route: str, *, headers: Mapping[str, str], quiet_s: float) -> Iterator[Iterator[str]]:
        """The body of a GET line by line, for as long as it comes; a silence of `quiet_s` counts as unreachable."""
        timeout = httpx2.Timeout(quiet_s, connect=5.0)
        with self._reaching(), self._http.stream("GET", self._full(route), headers=dict(headers), timeout=timeout) as response:
            if response.is_error:
                response.read()
                raise _problem(response)
            yield response.iter_lines()

    def request(self, method: str, route: str, **options: Any) -> httpx2.Response:
        """One call; an idempotent one waits and tries again where the registry answers 503."""
        tries = MAX_TRIES if method in IDEMPOTENT else 1
        for left in reversed(range(tries)):
            try:
                return self._send(method, route, **options)
            except Overloaded as overloaded:
                if not left or overloaded.retry_after_s > MAX_RETRY_WAIT_S:
                    raise
                time.sleep(overloaded.retry_after_s)
        raise AssertionError("the last try returns or raises")

    def probe(self, route: str) -> tuple[int, Json]:
        """Status and body of a health route at the root (`/readyz`), whatever the status."""
        with self._reaching():
            response = self._http.get(self.url + route)
        return response.status_code, _body(response)

    def _json(self, method: str, route: str, **options: Any) -> Json:
        return self._decode(self.request(method, route, **options))

    def _decode(self, response: httpx2.Response) -> Json:
        return self._parsed(response, kind=dict) if response.content else {}

    def _parsed(self, response: httpx2.Response, *, kind: type[T]) -> T:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, kind):
            raise CliFailure(f"{response.url} did not answer with JSON", remedy="check that --url names a Lorary registry", url=self.url)
        return body

    def _send(self, method: str, route: str, **options: Any) -> httpx2.Response:
        with self._reaching():
            response = self._http.request(method, self._full(route), **options)
        if response.is_success:
            return response
        raise _problem(response)

    def _full(self, route: str) -> str:
        return f"{self.url}/api/v1{route}"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise CliFailure(
                f"cannot reach the registry at {self.url}: {reason}",
                remedy="start it (`lorary up`), or give its address with --url or LORARY_URL",
            ) from error


class PartFailed(Exception):
    """A part did not arrive, and may with another try: the connection broke, the store is away, or its URL is too old."""


class Overloaded(ApiProblem):
    """503: worth another try after `retry_after_s`."""

    retry_after_s: float = 1.0


def _problem(response: httpx2.Response) -> ApiProblem:
    what = f"{response.request.method} {response.url.path}"
    if response.status_code != 503:
        return ApiProblem(response.status_code, _body(response), what=what)
    problem = Overloaded(503, _body(response), what=what)
    after = response.headers.get("Retry-After", "")
    problem.retry_after_s = float(after) if after.isdigit() else 1.0
    return problem


def _body(response: httpx2.Response) -> Json:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
