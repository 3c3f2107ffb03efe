"""Another tenant's adapter does not exist: every endpoint answers as for a name that nobody has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.registry.adapters.pushing import Pusher, adapter

pytestmark = pytest.mark.postgresql

Work = Callable[[], int]

ENDPOINTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/adapters/{name}", {}),
    ("PATCH", "/adapters/{name}", {"json": {"description": "mine now"}}),
    ("DELETE", "/adapters/{name}", {}),
    ("POST", "/adapters/{name}/restore", {}),
    ("POST", "/adapters/{name}/purge", {}),
    ("GET", "/adapters/{name}/versions", {}),
    ("GET", "/adapters/{name}/versions/1", {}),
    ("DELETE", "/adapters/{name}/versions/1", {}),
    ("GET", "/adapters/{name}/versions/1/card", {}),
    ("POST", "/adapters/{name}/versions/1/restore", {}),
    ("POST", "/adapters/{name}/versions/1/purge", {}),
    ("GET", "/adapters/{name}/versions/1/files/adapter_config.json", {}),
    ("GET", "/adapters/{name}/versions/1/lineage", {}),
    ("GET", "/adapters/{name}/aliases", {}),
    ("GET", "/adapters/{name}/aliases/default", {}),
    ("PUT", "/adapters/{name}/aliases/default", {"json": {"version": 1}, "headers": {"If-Match": '"1"'}}),
    ("PUT", "/adapters/{name}/aliases/prod", {"json": {"version": 1}, "headers": {"If-None-Match": "*"}}),
    ("DELETE", "/adapters/{name}/aliases/default", {}),
    ("GET", "/adapters/{name}/aliases/default/history", {}),
]


def body(response: Any, *, named: str, as_if: str) -> str:
    """The answer as it would read for another name. Ids of requests differ by nature."""
    text = str(response.text).replace(str(response.headers["x-request-id"]), "<request>")
    return text.replace(named, as_if)


@pytest.fixture
def secret(acme: Pusher, work: Work) -> str:
    """An adapter of acme's, ready."""
    acme.push("secret", adapter())
    work()
    return "secret"


def test_same_answer_as_for_an_absent_name(acme: Pusher, globex: Pusher, secret: str) -> None:
    before = acme.get("/adapters/secret")
    for method, path, options in ENDPOINTS:
        theirs = globex.call(method, path.format(name=secret), **options)
        absent = globex.call(method, path.format(name="absent"), **options)
        assert theirs.status_code == absent.status_code == 404, f"{method} {path}"
        assert body(theirs, named=secret, as_if="absent") == body(absent, named="absent", as_if="absent"), f"{method} {path}"
        assert acme.get("/adapters/secret") == before, f"{method} {path} moved something"


def test_every_path_with_a_name_stands_in_the_table(acme: Pusher) -> None:
    paths = acme.client.get("/openapi.json").json()["paths"]
    offered = {
        (method.upper(), path.removeprefix("/api/v1"))
        for path, methods in paths.items()
        if path.startswith("/api/v1/adapters/{name}")
        for method in methods
    }
    filled = {"{number}": "1", "{path}": "adapter_config.json", "{alias}": "default"}

    def fill(path: str) -> str:
        for key, value in filled.items():
            path = path.replace(key, value)
        return path

    tabled = {(method, path) for method, path, _options in ENDPOINTS}
    assert {(method, fill(path)) for method, path in offered} - tabled == {("POST", "/adapters/{name}/versions")}


def test_listings_show_ones_own_alone(acme: Pusher, globex: Pusher, secret: str) -> None:
    globex.push("mine", adapter(1))
    assert [item["name"] for item in globex.get("/adapters")["items"]] == ["mine"]
    assert [item["name"] for item in acme.get("/adapters")["items"]] == [secret]


def test_the_same_name_and_bytes_are_two_adapters(acme: Pusher, globex: Pusher, secret: str, work: Work) -> None:
    assert globex.push(secret, adapter()).status_code == 201, "nothing tells globex that these bytes are known"
    work()
    globex.call("DELETE", f"/adapters/{secret}")
    assert acme.get(f"/adapters/{secret}/versions/1")["status"] == "ready"


def test_blobs_are_not_an_oracle(acme: Pusher, globex: Pusher, secret: str) -> None:
    digest = acme.get(f"/adapters/{secret}/versions/1")["files"][0]["sha256"]
    for method in ("GET", "HEAD"):
        theirs, absent = globex.call(method, f"/blobs/{digest}"), globex.call(method, f"/blobs/{'0' * 64}")
        assert theirs.status_code == absent.status_code == 404
        assert body(theirs, named=digest, as_if="0" * 64) == body(absent, named="0" * 64, as_if="0" * 64)


def test_a_read_key_changes_nothing(acme: Pusher, secret: str, make_key: Callable[..., str]) -> None:
    reader = Pusher(acme.client, {"Authorization": f"Bearer {make_key('adapters:read', tenant='acme')}"})
    assert reader.get(f"/adapters/{secret}")["name"] == secret
    for method, path, options in ENDPOINTS:
        if method != "GET":
            assert reader.call(method, path.format(name=secret), **options).status_code == 403, path
    assert reader.call("POST", f"/adapters/{secret}/versions", json={"files": {"a": "0" * 64}}).status_code == 403
    assert reader.call("PUT", f"/blobs/{'0' * 64}", content=b"").status_code == 403


def test_no_key_no_answer(acme: Pusher, secret: str) -> None:
    for method, path, options in ENDPOINTS:
        stranger = acme.client.request(method, f"/api/v1{path.format(name=secret)}", **options)
        assert stranger.status_code == 401, path
