"""The registry as a source of adapters: resolve a form, then pull its blobs, with the grant of the request that asks.

Nothing is verified here beyond the shape of the answers: the disk cache recomputes every digest. What this file owns
is patience: registries restart and connections break, so calls are retried and downloads go on where they stopped.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
from pydantic import ValidationError

from gpu_runtime.adapters.source import AdapterUnavailable, Sink
from gpu_runtime.core import AdapterKey
from gpu_runtime.server.tracing import pulling
from registry.wire import GRANT_HEADER, PULL_PATH, RESOLVE_PATH, FormDescription, ResolveRequest, WireVersionMismatch, require_wire_version

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 4 << 20  # a form's manifest, or a problem; blobs are bounded by the sink

T = TypeVar("T")


class _Broken(Exception):
    """An attempt failed in a way that the next one may survive. `after_s`: the registry's Retry-After."""

    def __init__(self, reason: str, *, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class RegistrySource:
    """An `AdapterSource` over the registry's HTTP interface. Safe to use from any number of threads.

    `key` is the replica's API key (scope `replica`). Connection errors, 429 and 5xx are tried `attempts` times in all,
    with doubling pauses from `backoff_s`; `close` cuts the pauses short.
    """

    def __init__(
        self,
        registry_url: str,
        *,
        key: str,
        attempts: int = 5,
        backoff_s: float = 0.2,
        timeout: httpx2.Timeout | None = None,
    ) -> None:
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._closed = threading.Event()
        self._client = httpx2.Client(
            base_url=registry_url,
            headers={"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"},
            timeout=timeout or httpx2.Timeout(30.0, connect=5.0),
            trust_env=False,
        )

    def close(self) -> None:
        self._closed.set()
        self._client.close()

    def describe(self, key: AdapterKey, *, grant: str | None) -> tuple[Mapping[str, Any], str]:
        """(form manifest, version digest). Raises AdapterUnavailable."""
        asked = ResolveRequest(tenant=key.tenant, form_digest=key.form_digest, grant=_required(grant))
        with pulling("adapter.resolve", key=key, grant=grant) as trace:
            description = self._patiently(lambda: self._resolve(asked, headers=trace), key=key)
        if (description.tenant, description.form_digest) != key:
            raise AdapterUnavailable("the registry described another form than the one asked for", retryable=False)
        return description.manifest, description.version_digest

    def fetch(self, key: AdapterKey, sha256: str, into: Sink, *, grant: str | None) -> None:
        """Write the blob into `into`, in order and without a gap, over as many connections as it takes."""
        download = _Download(into)
        granted = {GRANT_HEADER: _required(grant)}
        with pulling("adapter.pull", key=key, grant=grant) as trace:
            self._patiently(lambda: self._download(f"{PULL_PATH}/{sha256}", download, headers=granted | trace), key=key)
        log.info("adapter.blob_pulled", extra={"tenant": key.tenant, "form_digest": key.form_digest, "blob_bytes": download.num_bytes})

    def _resolve(self, asked: ResolveRequest, *, headers: Mapping[str, str]) -> FormDescription:
        with self._answer("POST", RESOLVE_PATH, json=asked.model_dump(mode="json"), headers=headers) as response:
            body = _decoded(_bounded_body(response))
        try:
            require_wire_version(body)
            return FormDescription.model_validate(body)
        except (WireVersionMismatch, ValidationError) as error:
            raise AdapterUnavailable(f"the registry's answer to resolve cannot be used: {error}", retryable=True) from error

    def _download(self, path: str, download: _Download, *, headers: Mapping[str, str]) -> None:
        have = download.num_bytes
        ranged = {**headers, "Range": f"bytes={have}-"} if have else headers
        with self._answer("GET", path, headers=ranged) as response:
            download.take(response, have=have)

    @contextmanager
    def _answer(self, method: str, path: str, **request: Any) -> Iterator[httpx2.Response]:
        """A response that can be used. Raises _Broken where another attempt makes sense, else AdapterUnavailable."""
        try:
            with self._client.stream(method, path, **request) as response:
                _raise_for_refusal(response)
                yield response
        except httpx2.TransportError as error:
            raise _Broken(f"the registry cannot be reached: {type(error).__name__}") from error

    def _patiently(self, attempt: Callable[[], T], *, key: AdapterKey) -> T:
        pause_s = self._backoff_s
        for number in range(1, self._attempts + 1):
            try:
                return attempt()
            except _Broken as error:
                log.warning("adapter.pull_broken", extra={"form_digest": key.form_digest, "attempt": number, "reason": str(error)})
                if number == self._attempts or self._closed.wait(_jittered(max(pause_s, min(error.after_s or 0.0, 5.0)))):
                    raise AdapterUnavailable(str(error), retryable=True) from error
                pause_s *= 2
        raise AssertionError("an attempt either returns or raises")


class _Download:
    """How far one blob has come. A response that starts again from byte 0 is skipped up to where we are."""

    def __init__(self, into: Sink) -> None:
        self._into = into
        self.num_bytes = 0

    def take(self, response: httpx2.Response, *, have: int) -> None:
        skip = have - _first_byte(response, asked=have)
        for chunk in response.iter_raw():  # as it comes off the socket: gathered chunks would be lost when it breaks
            fresh = chunk[skip:]
            skip = max(0, skip - len(chunk))
            if fresh:
                self._into.write(fresh)
                self.num_bytes += len(fresh)


def _first_byte(response: httpx2.Response, *, asked: int) -> int:
    """Where this response's bytes start. A range that does not start where we asked cannot be used."""
    if response.status_code != 206:
        return 0
    if not response.headers.get("Content-Range", "").startswith(f"bytes {asked}-"):
        raise AdapterUnavailable("the registry sent another range than the one asked for", retryable=True)
    return asked


def _required(grant: str | None) -> str:
    if not grant:
        raise AdapterUnavailable("an adapter can only be pulled with the grant of a request that uses it", retryable=False)
    return grant


def _raise_for_refusal(response: httpx2.Response) -> None:
    status = response.status_code
    if status < 400:
        return
    problem = _decoded(_bounded_body(response))
    detail = problem.get("detail") if isinstance(problem, dict) else None
    reason = str(detail or f"the registry answered {status}")
    if status >= 500 or status == 429:
        raise _Broken(reason, after_s=_retry_after_s(response))
    # 404 and 422 are about the adapter and stay true; 401, 403 and 409 are about this replica, key or grant.
    raise AdapterUnavailable(reason, retryable=status not in (404, 422))


def _bounded_body(response: httpx2.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise AdapterUnavailable(f"the registry's answer is larger than {MAX_ANSWER_BYTES} bytes", retryable=False)
    return bytes(body)


def _decoded(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _retry_after_s(response: httpx2.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _jittered(pause_s: float) -> float:
    return pause_s * random.uniform(0.75, 1.25)  # noqa: S311 - spreads replicas out, decides nothing
