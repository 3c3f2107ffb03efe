"""`/blobs` over HTTP: hashed in flight, bounded, ranges, what a full disk and a broken connection leave behind."""

from __future__ import annotations

import hashlib
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from sqlalchemy import func, select
from starlette.testclient import TestClient

from registry.blobs.endpoints import parse_range
from registry.blobs.models import Blob
from registry.config import Settings
from registry.db import Database
from registry.errors import RangeNotSatisfiable
from tests.registry.conftest import MakeTenant, bearer

DATA = b"some weights " * 1000
SHA = hashlib.sha256(DATA).hexdigest()
URL = f"/api/v1/blobs/{SHA}"


@pytest.fixture
def key(make_tenant: MakeTenant) -> dict[str, str]:
    return bearer(make_tenant("acme"))


def rows(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Blob)) or 0


def files(settings: Settings) -> list[str]:
    return [path.name for path in settings.blob_dir.rglob("*") if path.is_file()]


def test_put_then_put_again(client: TestClient, key: dict[str, str], database: Database) -> None:
    first, again = client.put(URL, headers=key, content=DATA), client.put(URL, headers=key, content=DATA)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert first.json() | {"created_at": ""} == {"sha256": SHA, "size": len(DATA), "created_at": ""}
    assert rows(database) == 1


def test_head_and_get(client: TestClient, key: dict[str, str]) -> None:
    assert client.head(URL, headers=key).status_code == 404
    assert client.get(URL, headers=key).json()["code"] == "blob_missing"
    client.put(URL, headers=key, content=DATA)
    head = client.head(URL, headers=key)
    assert (head.status_code, head.headers["content-length"], head.headers["etag"]) == (200, str(len(DATA)), f'"{SHA}"')
    assert client.get(URL, headers=key).content == DATA


def test_get_of_a_range(client: TestClient, key: dict[str, str]) -> None:
    client.put(URL, headers=key, content=DATA)
    part = client.get(URL, headers=key | {"Range": "bytes=5-11"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, DATA[5:12], f"bytes 5-11/{len(DATA)}")
    beyond = client.get(URL, headers=key | {"Range": f"bytes={len(DATA)}-"})
    assert (beyond.status_code, beyond.json()["field"], beyond.headers["content-range"]) == (416, "Range", f"bytes */{len(DATA)}")
    whole = client.get(URL, headers=key | {"Range": "lines=0-1"})
    assert (whole.status_code, whole.content) == (200, DATA)


@pytest.mark.parametrize(
    ("header", "expected"),
    [("bytes=0-0", (0, 1)), ("bytes=2-", (2, 8)), ("bytes=-3", (7, 3)), ("bytes=-99", (0, 10)), ("bytes=8-99", (8, 2))],
)
def test_ranges_that_are_read(header: str, expected: tuple[int, int]) -> None:
    assert parse_range(header, size=10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=-0", "bytes=10-12"])
def test_ranges_beyond_the_end(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range(header, size=10)


@pytest.mark.parametrize("header", ["bytes=-", "bytes=5-4", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", ""])
def test_ranges_that_are_ignored(header: str) -> None:
    assert parse_range(header, size=10) is None


def test_wrong_digest_is_refused_and_kept_nowhere(client: TestClient, key: dict[str, str], database: Database, settings: Settings) -> None:
    response = client.put(URL, headers=key, content=DATA + b"!")
    assert (response.status_code, response.json()["code"], response.json()["field"]) == (422, "digest_mismatch", "sha256")
    assert (rows(database), files(settings)) == (0, [])


@pytest.mark.parametrize("address", ["0" * 63, "0" * 64 + "0", "A" * 64, "..%2f..%2fetc"])
def test_addresses_that_are_no_digests(client: TestClient, key: dict[str, str], address: str) -> None:
    assert client.put(f"/api/v1/blobs/{address}", headers=key, content=b"").status_code in {404, 422}


class TestBounds:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_inline_blob_bytes": 1000})

    def test_announced_excess_is_refused_unread(self, client: TestClient, key: dict[str, str], settings: Settings) -> None:
        response = client.put(URL, headers=key, content=DATA)
        assert (response.status_code, response.json()["field"]) == (413, "Content-Length")
        assert files(settings) == []

    def test_unannounced_excess_is_noticed(self, client: TestClient, key: dict[str, str], database: Database, settings: Settings) -> None:
        def chunks() -> Iterator[bytes]:
            yield from (DATA[:400], DATA[400:900], DATA[900:])

        response = client.put(URL, headers=key, content=chunks())
        assert (response.status_code, response.json()["code"]) == (413, "too_large")
        assert (rows(database), files(settings)) == (0, [])


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """Calling it forbids this process files above 200 kB, as the kernel would on a full disk; undone afterwards."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_507_and_leaves_nothing(
    client: TestClient, key: dict[str, str], *, database: Database, settings: Settings, full_disk: Callable[[], None]
) -> None:
    big = bytes(300_000)
    url = f"/api/v1/blobs/{hashlib.sha256(big).hexdigest()}"
    full_disk()
    response = client.put(url, headers=key, content=big)
    assert (response.status_code, response.json()["code"]) == (507, "storage_full")
    assert response.json()["remedy"]
    assert (rows(database), files(settings)) == (0, [])


def test_a_broken_connection_leaves_nothing(
    app: FastAPI, server_url: str, key: dict[str, str], *, database: Database, settings: Settings
) -> None:
    """The client announces more than it sends and goes away in the middle."""
    address = urlsplit(server_url)
    head = f"PUT {URL} HTTP/1.1\r\nHost: x\r\nAuthorization: {key['Authorization']}\r\nContent-Length: {2**22}\r\n\r\n"
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(head.encode() + bytes(2**21))
        wait_until(lambda: len(files(settings)) == 1)
    wait_until(lambda: files(settings) == [])
    assert rows(database) == 0


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
