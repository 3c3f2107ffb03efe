"""`/blobs` over S3: what a client sees of a store that is away, refuses, redirects or has rotted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import httpx2
import pytest
from starlette.testclient import TestClient

from registry.config import Settings
from tests.registry.blobs.gate import Gate
from tests.registry.conftest import MakeTenant, bearer
from tests.registry.places import Place, s3_settings

DATA = b"some weights " * 1000
SHA = hashlib.sha256(DATA).hexdigest()
URL = f"/api/v1/blobs/{SHA}"


@pytest.fixture
def gate(place: Place) -> Iterator[Gate]:
    with Gate(place.server.endpoint_url) as gate:
        yield gate


@pytest.fixture
def changes() -> dict[str, object]:
    return {}


@pytest.fixture
def settings(settings: Settings, place: Place, gate: Gate, changes: dict[str, object]) -> Settings:
    options = s3_settings(place.server, endpoint_url=gate.url, max_attempts=1, **changes)
    return settings.model_copy(update={"blob_url": place.url, "s3": options})


@pytest.fixture
def key(make_tenant: MakeTenant) -> dict[str, str]:
    return bearer(make_tenant("acme"))


def test_put_head_get_and_a_range(client: TestClient, key: dict[str, str]) -> None:
    assert [client.put(URL, headers=key, content=DATA).status_code for _ in range(2)] == [201, 200]
    assert client.head(URL, headers=key).headers["content-length"] == str(len(DATA))
    assert client.get(URL, headers=key).content == DATA
    part = client.get(URL, headers=key | {"Range": "bytes=5-11"})
    assert (part.status_code, part.content) == (206, DATA[5:12])


def test_a_store_that_is_away_is_503_and_comes_back(client: TestClient, key: dict[str, str], gate: Gate) -> None:
    client.put(URL, headers=key, content=DATA)
    gate.close()
    other = f"/api/v1/blobs/{hashlib.sha256(b'other').hexdigest()}"
    upload = {"sha256": "a" * 64, "size": 5}
    answers = [client.get(URL, headers=key), client.head(URL, headers=key), client.put(other, headers=key, content=b"other")]
    answers.append(client.post("/api/v1/uploads", headers=key, json=upload))
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "2")}
    assert client.get("/readyz").status_code == 503
    gate.open()
    assert client.get(URL, headers=key).content == DATA
    assert client.put(other, headers=key, content=b"other").status_code == 201
    assert client.post("/api/v1/uploads", headers=key, json=upload).status_code == 201


@pytest.mark.parametrize("changes", [{"secret_access_key": "wrong"}])
def test_wrong_credentials_are_the_operators_to_mend(client: TestClient, key: dict[str, str]) -> None:
    refused = client.put(URL, headers=key, content=DATA)
    assert (refused.status_code, refused.json()["code"]) == (503, "blob_store_refused")
    assert "SignatureDoesNotMatch" in client.get("/readyz").json()["checks"]["blob_store"]
    assert "wrong" not in refused.text


def test_bytes_that_rotted_are_not_what_their_etag_says(client: TestClient, key: dict[str, str], place: Place) -> None:
    """A reader that hashes notices; uploading again heals."""
    client.put(URL, headers=key, content=DATA)
    [address] = place.keys()
    place.put(address, DATA[:-1] + b"!")
    got = client.get(URL, headers=key)
    assert hashlib.sha256(got.content).hexdigest() != got.headers["etag"].strip('"')
    client.put(URL, headers=key, content=DATA)
    assert client.get(URL, headers=key).content == DATA


class TestRedirect:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"blob_redirect": True})

    def test_downloads_go_to_the_store(self, client: TestClient, key: dict[str, str]) -> None:
        client.put(URL, headers=key, content=DATA)
        answer = client.get(URL, headers=key, follow_redirects=False)
        assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-store")
        part = httpx2.get(answer.headers["location"], headers={"Range": "bytes=0-3"})
        assert (part.status_code, part.content) == (206, DATA[:4])

    def test_another_tenant_gets_no_url(self, client: TestClient, key: dict[str, str], make_tenant: MakeTenant) -> None:
        client.put(URL, headers=key, content=DATA)
        assert client.get(URL, headers=bearer(make_tenant("other")), follow_redirects=False).status_code == 404
