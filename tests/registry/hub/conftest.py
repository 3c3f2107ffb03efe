"""A tenant's ready adapter behind real HTTP, and the real Hub client on it. Nothing of the caller's own Hub set-up leaks in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi

from tests.registry.adapters.conftest import acme, base_model, globex, operator, work, worker
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import MakeTenant

__all__ = ["acme", "base_model", "globex", "operator", "work", "worker"]

FILES = adapter(1).files | {"README.md": b"# Pirate\n"}
NEWER = adapter(2).files


@dataclass(frozen=True)
class Reader:
    """The Hub's client as one key, with a cache of its own."""

    api: HfApi
    token: str
    cache: Path

    def snapshot(self, repo: str, **options: Any) -> dict[str, bytes]:
        """{path: bytes} of a downloaded snapshot."""
        folder = Path(self.api.snapshot_download(repo, cache_dir=self.cache, **options))
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    def file(self, repo: str, path: str, **options: Any) -> bytes:
        return Path(self.api.hf_hub_download(repo, path, cache_dir=self.cache, **options)).read_bytes()


def token_of(pusher: Pusher) -> str:
    return pusher.headers["Authorization"].removeprefix("Bearer ")


@pytest.fixture
def client(server_url: str) -> Iterator[httpx2.Client]:
    """Instead of the in-process client: the same application must not start twice."""
    with httpx2.Client(base_url=server_url, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def make_reader(server_url: str, tmp_path: Path) -> Callable[[str], Reader]:
    def make(token: str) -> Reader:
        return Reader(HfApi(endpoint=server_url, token=token), token, tmp_path / f"cache-{token[-6:]}")

    return make


@pytest.fixture
def pirate(acme: Pusher, work: Callable[[], int]) -> list[dict[str, Any]]:
    """`acme/pirate`: version 1 (also `prod`), version 2 (`default`), and what the registry's own API says of them."""
    for files in (FILES, NEWER):
        assert acme.push("pirate", files).status_code == 201
        assert work() == 1
    assert acme.put_alias("pirate", "prod", 1, **{"If-None-Match": "*"}).status_code == 201
    assert acme.put_alias("pirate", "default", 2, **{"If-Match": '"1"'}).status_code == 200
    return [acme.get(f"/adapters/pirate/versions/{number}") for number in (1, 2)]


@pytest.fixture
def reader(acme: Pusher, pirate: list[dict[str, Any]], make_reader: Callable[[str], Reader]) -> Reader:
    return make_reader(token_of(acme))


@pytest.fixture
def http(server_url: str, acme: Pusher, pirate: list[dict[str, Any]]) -> Iterator[httpx2.Client]:
    """Plain HTTP as acme."""
    with httpx2.Client(base_url=server_url, headers=acme.headers, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def stranger(make_tenant: MakeTenant, make_reader: Callable[[str], Reader], pirate: list[dict[str, Any]]) -> Reader:
    """A reader of another tenant."""
    return make_reader(make_tenant("initech"))
