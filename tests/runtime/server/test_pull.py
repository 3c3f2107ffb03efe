"""Pulling from a registry: the real one, and ones that break in every way that networks and restarts bring."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import AdapterKey
from gpu_runtime.server.pull import RegistrySource
from registry.artifact.manifest import FormManifest
from registry.wire import GRANT_HEADER, WIRE_VERSION, GrantClaims
from tests.registry.serving.conftest import Pushed, World, closed_port_url, make_replica, make_world, serving

KEY = AdapterKey("t" * 32, "f" * 64)
BLOB = bytes(range(256)) * 200  # 51,200 bytes
DESCRIPTION = {
    "wire_version": WIRE_VERSION, "tenant": KEY.tenant, "version_digest": "a" * 64, "form_digest": KEY.form_digest, "base_digest": "b" * 64,
    "manifest": {"kind": "raw"},
}  # fmt: skip

Reply = Callable[[dict[str, str], Any], Any]


@dataclass
class Scripted:
    """A registry that answers each request with the next of `replies`, the last one for ever."""

    replies: list[Reply]
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((scope["path"], headers))
        reply = self.replies[min(len(self.requests), len(self.replies)) - 1]
        await reply(headers, send)


def says(status: int, body: object, **headers: str) -> Reply:
    async def reply(_asked: dict[str, str], send: Any) -> None:
        content = json.dumps(body).encode()
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": [*pairs, (b"content-length", b"%d" % len(content))]})
        await send({"type": "http.response.body", "body": content})

    return reply


def blob(*, until: int | None = None, ranges: bool = True, shift: int = 0) -> Reply:
    """BLOB, or what Range asks for of it; the connection is cut after `until` bytes of the answer."""

    async def reply(asked: dict[str, str], send: Any) -> None:
        start = int(asked["range"].removeprefix("bytes=").rstrip("-")) if ranges and "range" in asked else 0
        rest = BLOB[start:]
        headers = [(b"content-length", b"%d" % len(rest))]
        if start:
            headers.append((b"content-range", b"bytes %d-%d/%d" % (start + shift, len(BLOB) - 1, len(BLOB))))
        await send({"type": "http.response.start", "status": 206 if start else 200, "headers": headers})
        await send({"type": "http.response.body", "body": rest if until is None else rest[:until], "more_body": until is not None})
        if until is not None:
            send.__self__.transport.close()

    return reply


@pytest.fixture
def source_of() -> Iterator[Callable[..., tuple[RegistrySource, Scripted]]]:
    running: list[Any] = []

    def make(*replies: Reply, attempts: int = 3) -> tuple[RegistrySource, Scripted]:
        registry = Scripted(list(replies))
        server = serving(registry)
        source = RegistrySource(server.__enter__(), key="k", attempts=attempts, backoff_s=0.01)
        running.append((source, server))
        return source, registry

    yield make
    for source, server in running:
        source.close()
        server.__exit__(None, None, None)


def refusal(call: Callable[[], object]) -> AdapterUnavailable:
    with pytest.raises(AdapterUnavailable) as caught:
        call()
    return caught.value


SourceOf = Callable[..., tuple[RegistrySource, Scripted]]


# ---- the real registry ----


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path)
    yield made
    made.database.close()


def granted(world: World, pushed: Pushed, replica_id: str) -> str:
    now = int(time.time())
    claims = GrantClaims(
        aud=replica_id, jti="j", iat=now, exp=now + 30, tenant=pushed.tenant_id, model="m",
        version_digest=pushed.version_digest, form_digest=pushed.form_digest, max_tokens=1, key_id="k",
    )  # fmt: skip
    return world.signer.sign(claims)


def test_an_adapter_comes_out_of_the_registry_as_it_was_pushed(world: World) -> None:
    pushed, gone = world.push("acme", "pirate"), world.push("acme", "gone")
    with serving(world.app) as url, httpx2.Client(base_url=url, trust_env=False) as http:
        replica_id = make_replica(http, world)
        source = RegistrySource(url, key=world.keys["replica"], backoff_s=0.01)
        key, grant = AdapterKey(pushed.tenant_id, pushed.form_digest), granted(world, pushed, replica_id)
        manifest, version_digest = source.describe(key, grant=grant)
        assert (FormManifest.from_json(manifest).digest, version_digest) == (pushed.form_digest, pushed.version_digest)
        for sha256, data in pushed.blobs.items():
            into = io.BytesIO()
            source.fetch(key, sha256, into, grant=grant)
            assert into.getvalue() == data
        other = AdapterKey(gone.tenant_id, gone.form_digest)
        assert "grant" in refusal(lambda: source.describe(other, grant=grant)).reason
        world.execute("UPDATE adapters SET deleted_at = '2026-01-01 00:00:00.000000' WHERE name = 'gone'")
        late = granted(world, gone, replica_id)
        assert not refusal(lambda: source.describe(other, grant=late)).retryable
        assert not refusal(lambda: source.fetch(other, gone.weights, io.BytesIO(), grant=late)).retryable
        source.close()


# ---- registries that break ----


def test_key_and_grant_are_sent(source_of: SourceOf) -> None:
    source, registry = source_of(says(200, DESCRIPTION), blob())
    assert source.describe(KEY, grant="g") == ({"kind": "raw"}, "a" * 64)
    source.fetch(KEY, "c" * 64, io.BytesIO(), grant="g")
    assert [path for path, _ in registry.requests] == ["/api/v1/resolve", "/api/v1/pull/" + "c" * 64]
    assert registry.requests[1][1]["authorization"] == "Bearer k"
    assert registry.requests[1][1][GRANT_HEADER.lower()] == "g"
    assert "range" not in registry.requests[1][1]


def test_a_broken_download_goes_on_where_it_stopped(source_of: SourceOf) -> None:
    source, registry = source_of(blob(until=20_000), says(503, {}), blob(until=10_000), blob(), attempts=4)
    into = io.BytesIO()
    source.fetch(KEY, "c" * 64, into, grant="g")
    assert into.getvalue() == BLOB
    assert [headers.get("range") for _, headers in registry.requests] == [None, "bytes=20000-", "bytes=20000-", "bytes=30000-"]


def test_a_registry_without_ranges_costs_time_not_bytes(source_of: SourceOf) -> None:
    source, _ = source_of(blob(until=20_000, ranges=False), blob(ranges=False))
    into = io.BytesIO()
    source.fetch(KEY, "c" * 64, into, grant="g")
    assert into.getvalue() == BLOB


def test_another_range_than_asked_for_is_refused(source_of: SourceOf) -> None:
    source, _ = source_of(blob(until=20_000), blob(shift=5))
    assert "another range" in refusal(lambda: source.fetch(KEY, "c" * 64, io.BytesIO(), grant="g")).reason


def test_a_sink_that_has_enough_ends_the_download(source_of: SourceOf) -> None:
    class Full:
        def write(self, data: bytes, /) -> int:
            raise AdapterUnavailable("larger than the manifest says", retryable=False)

    source, registry = source_of(blob())
    assert refusal(lambda: source.fetch(KEY, "c" * 64, Full(), grant="g")).reason == "larger than the manifest says"
    assert len(registry.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_registry_in_trouble_is_asked_again(source_of: SourceOf, status: int) -> None:
    source, registry = source_of(says(status, {"detail": "busy"}), says(status, "?"), says(200, DESCRIPTION))
    assert source.describe(KEY, grant="g")[1] == "a" * 64
    assert len(registry.requests) == 3


def test_and_given_up_after_a_while(source_of: SourceOf) -> None:
    source, registry = source_of(says(503, {"detail": "the database does not answer"}))
    failure = refusal(lambda: source.describe(KEY, grant="g"))
    assert (failure.reason, failure.retryable, len(registry.requests)) == ("the database does not answer", True, 3)


def test_retry_after_is_honoured(source_of: SourceOf) -> None:
    source, _ = source_of(says(503, {}, retry_after="1"), says(200, DESCRIPTION))
    started = time.monotonic()
    source.describe(KEY, grant="g")
    assert time.monotonic() - started > 0.7


def test_nobody_listening_is_retryable() -> None:
    source = RegistrySource(closed_port_url(), key="k", attempts=2, backoff_s=0.01)
    failure = refusal(lambda: source.describe(KEY, grant="g"))
    assert failure.retryable
    assert "ConnectError" in failure.reason
    source.close()


@pytest.mark.parametrize(("status", "retryable"), [(401, True), (403, True), (404, False), (409, True), (422, False)])
def test_refusals_are_final_now_and_say_whether_later_helps(source_of: SourceOf, status: int, retryable: bool) -> None:
    source, registry = source_of(says(status, {"detail": "why"}))
    failure = refusal(lambda: source.describe(KEY, grant="g"))
    assert (failure.reason, failure.retryable, len(registry.requests)) == ("why", retryable, 1)


@pytest.mark.parametrize(
    "answer",
    [
        DESCRIPTION | {"wire_version": WIRE_VERSION + 1},
        {name: value for name, value in DESCRIPTION.items() if name != "wire_version"},
        DESCRIPTION | {"unknown": 1},
        DESCRIPTION | {"tenant": "u" * 32},
        DESCRIPTION | {"form_digest": "e" * 64},
        [],
        "x" * (5 << 20),
    ],
    ids=["version 2", "no version", "unknown key", "other tenant", "other form", "list", "too large"],
)
def test_descriptions_that_are_not_what_was_asked_for_are_refused(source_of: SourceOf, answer: Any) -> None:
    source, _ = source_of(says(200, answer))
    assert refusal(lambda: source.describe(KEY, grant="g")).reason


@pytest.mark.parametrize("grant", [None, ""])
def test_nothing_is_asked_without_a_grant(source_of: SourceOf, grant: str | None) -> None:
    source, registry = source_of(says(200, DESCRIPTION))
    assert not refusal(lambda: source.describe(KEY, grant=grant)).retryable
    assert not refusal(lambda: source.fetch(KEY, "c" * 64, io.BytesIO(), grant=grant)).retryable
    assert registry.requests == []


def test_closing_cuts_the_patience_short() -> None:
    source = RegistrySource(closed_port_url(), key="k", attempts=10, backoff_s=30.0)
    threading.Timer(0.2, source.close).start()
    started = time.monotonic()
    assert refusal(lambda: source.describe(KEY, grant="g")).retryable
    assert time.monotonic() - started < 10
