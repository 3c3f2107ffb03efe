"""`/uploads` over every kind of store: one client flow, and never a half-written address."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx2
import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from registry.blobs.s3 import S3BlobStore
from registry.blobs.s3_bucket import S3Bucket
from registry.blobs.store import BlobStore, UploadLost
from registry.config import Settings
from registry.db import Database, utc_now
from registry.errors import Unavailable
from registry.uploads.models import LargeUpload
from tests.registry.conftest import MakeTenant, bearer
from tests.registry.uploads.conftest import PART

DATA = random.Random(1).randbytes(2 * PART + 777)
SHA = hashlib.sha256(DATA).hexdigest()
Key = dict[str, str]
Finalise = Callable[[], bool]


def begin(client: TestClient, key: Key, *, sha256: str = SHA, size: int = len(DATA)) -> dict[str, Any]:
    response = client.post("/api/v1/uploads", headers=key, json={"sha256": sha256, "size": size})
    assert response.status_code in {200, 201}, response.text
    return dict(response.json())


def locate(client: TestClient, key: Key, upload: dict[str, Any], number: int) -> str:
    response = client.post(f"/api/v1/uploads/{upload['id']}/parts", headers=key, json={"numbers": [number]})
    assert response.status_code == 200, response.text
    return str(response.json()["items"][0]["url"])


def put_url(client: TestClient, key: Key, url: str, data: bytes) -> int:
    if url.startswith("/"):
        return client.put(url, headers=key, content=data).status_code
    return httpx2.put(url, content=data, timeout=30).status_code


def send(client: TestClient, key: Key, upload: dict[str, Any], *numbers: int, data: bytes = DATA) -> None:
    for number in numbers:
        part = data[(number - 1) * PART : number * PART]
        assert put_url(client, key, locate(client, key, upload, number), part) == 200


def complete(client: TestClient, key: Key, upload: dict[str, Any]) -> Any:
    return client.post(f"/api/v1/uploads/{upload['id']}/complete", headers=key)


def look(client: TestClient, key: Key, upload: dict[str, Any]) -> dict[str, Any]:
    return dict(client.get(f"/api/v1/uploads/{upload['id']}", headers=key).json())


def test_parts_become_a_blob(client: TestClient, key: Key, finalise: Finalise, *, kind: str, store: BlobStore, settings: Settings) -> None:
    upload = begin(client, key)
    assert (upload["num_parts"], upload["part_bytes"], upload["state"], upload["parts"]) == (3, PART, "open", [])
    assert locate(client, key, upload, 1).startswith("http") == (kind == "s3 direct")
    send(client, key, upload, 3, 1, 2)
    assert client.head(f"/api/v1/blobs/{SHA}", headers=key).status_code == 404
    assert complete(client, key, upload).json()["state"] == "finalising"
    assert client.head(f"/api/v1/blobs/{SHA}", headers=key).status_code == 404
    assert finalise()
    done = look(client, key, upload)
    assert (done["state"], done["reason"], done["parts"]) == ("done", None, [])
    assert client.get(f"/api/v1/blobs/{SHA}", headers=key).content == DATA
    assert store.remove_stale_uploads(older_than_s=-1) == 0, "nothing is left beside the blob"
    assert complete(client, key, upload).json()["state"] == "done"
    if kind == "local":
        assert [path.name for path in settings.blob_dir.rglob("*") if path.is_file()] == [SHA]


def test_going_on_where_it_stopped(client: TestClient, key: Key, finalise: Finalise) -> None:
    upload = begin(client, key)
    send(client, key, upload, 1, 3)
    again = client.post("/api/v1/uploads", headers=key, json={"sha256": SHA, "size": len(DATA)})
    assert (again.status_code, again.json()["id"]) == (200, upload["id"])
    assert again.json()["parts"] == [{"number": 1, "size": PART}, {"number": 3, "size": 777}]
    early = complete(client, key, upload)
    assert (early.status_code, early.json()["code"], early.json()["value"]) == (409, "parts_missing", "2")
    send(client, key, upload, 2, 1)
    assert complete(client, key, upload).status_code == 202
    assert finalise()
    assert look(client, key, upload)["state"] == "done"


@pytest.mark.parametrize("kind", ["s3 through the API"], indirect=True)
def test_a_store_that_cannot_copy_gets_the_bytes_once_more(
    client: TestClient, key: Key, finalise: Finalise, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = S3Bucket.call

    def without_copy(bucket: S3Bucket, operation: str, at: str, **arguments: Any) -> Any:
        if operation == "copy_object":
            raise Unavailable("an internal error", retry_after_s=1)
        return call(bucket, operation, at, **arguments)

    monkeypatch.setattr(S3Bucket, "call", without_copy)
    upload = begin(client, key)
    send(client, key, upload, 1, 2, 3)
    assert complete(client, key, upload).status_code == 202
    assert finalise()
    assert look(client, key, upload)["state"] == "done"
    assert client.get(f"/api/v1/blobs/{SHA}", headers=key).content == DATA


def test_wrong_bytes_are_rejected_and_removed(client: TestClient, key: Key, finalise: Finalise, store: BlobStore) -> None:
    upload = begin(client, key)
    send(client, key, upload, 1, 2, 3, data=DATA[:100] + b"!" + DATA[101:])
    assert complete(client, key, upload).status_code == 202
    assert finalise()
    over = look(client, key, upload)
    assert (over["state"], over["reason"]["code"]) == ("rejected", "digest_mismatch")
    assert client.get(f"/api/v1/blobs/{SHA}", headers=key).status_code == 404
    assert list(store.list()) == []
    assert store.remove_stale_uploads(older_than_s=-1) == 0
    assert begin(client, key)["id"] != upload["id"], "it may be begun again"


def test_a_part_url_changes_nothing_after_completion(client: TestClient, key: Key, finalise: Finalise, store: BlobStore) -> None:
    upload = begin(client, key)
    url = locate(client, key, upload, 1)
    send(client, key, upload, 1, 2, 3)
    assert complete(client, key, upload).status_code == 202
    evil = os.urandom(PART)
    if url.startswith("/"):
        assert put_url(client, key, url, evil) == 409
    else:
        put_url(client, key, url, evil)  # the store does not know yet; the hash will
        put_url(client, key, url, DATA[:PART])
    assert finalise()
    assert look(client, key, upload)["state"] == "done"
    assert put_url(client, key, url, evil) in {404, 409}
    assert client.get(f"/api/v1/blobs/{SHA}", headers=key).content == DATA
    assert {(blob.sha256, blob.size) for blob in store.list()} == {(SHA, len(DATA))}
    assert store.remove_stale_uploads(older_than_s=-1) == 0


def test_part_sizes_are_held(client: TestClient, key: Key) -> None:
    upload = begin(client, key)
    url = f"/api/v1/uploads/{upload['id']}/parts"
    short, long = client.put(f"{url}/1", headers=key, content=b"x" * 10), client.put(f"{url}/3", headers=key, content=b"x" * 778)
    assert (short.status_code, short.json()["code"]) == (422, "part_size")
    assert (long.status_code, long.json()["code"]) == (413, "too_large")
    assert client.put(f"{url}/4", headers=key, content=b"x").status_code == 422
    assert client.post(url, headers=key, json={"numbers": [4]}).status_code == 422
    assert client.put(f"{url}/0", headers=key, content=b"x").status_code == 422
    assert look(client, key, upload)["parts"] == []


def test_a_presigned_part_is_held_to_its_size(client: TestClient, key: Key, kind: str) -> None:
    if kind != "s3 direct":
        return
    upload = begin(client, key)
    assert put_url(client, key, locate(client, key, upload, 1), b"x" * (PART + 1)) == 403
    assert look(client, key, upload)["parts"] == []


def test_abort_removes_what_arrived(client: TestClient, key: Key, store: BlobStore) -> None:
    upload = begin(client, key)
    url = locate(client, key, upload, 2)
    send(client, key, upload, 1)
    for _ in range(2):
        assert client.delete(f"/api/v1/uploads/{upload['id']}", headers=key).status_code == 204
    assert look(client, key, upload)["state"] == "aborted"
    assert put_url(client, key, url, DATA[PART : 2 * PART]) in {404, 409}
    assert complete(client, key, upload).json()["code"] == "upload_not_open"
    assert store.remove_stale_uploads(older_than_s=-1) == 0


def test_time_runs_out(client: TestClient, key: Key, store: BlobStore, database: Database) -> None:
    upload = begin(client, key)
    send(client, key, upload, 1)
    with database.system_write() as session:
        session.execute(update(LargeUpload).values(expires_at=utc_now()))
    assert complete(client, key, upload).status_code == 409
    assert look(client, key, upload)["state"] == "expired"
    assert store.remove_stale_uploads(older_than_s=-1) == 0
    assert begin(client, key)["id"] != upload["id"]


def test_what_a_crash_left_in_the_store_is_swept(client: TestClient, key: Key, store: BlobStore) -> None:
    """Parts that no row names: the process died between the store and the database."""
    assert store.begin_parts("1" * 32, "a" * 32) is not None
    assert store.remove_stale_uploads(older_than_s=3600) == 0
    assert store.remove_stale_uploads(older_than_s=-1) == 1


def test_bounds(client: TestClient, key: Key, settings: Settings) -> None:
    url, ask = "/api/v1/uploads", {"sha256": SHA, "size": len(DATA)}
    assert client.post(url, headers=key, json=ask | {"size": 0}).status_code == 422
    assert client.post(url, headers=key, json=ask | {"size": settings.max_upload_bytes + 1}).status_code == 413
    assert client.post(url, headers=key, json=ask | {"sha256": "x"}).status_code == 422
    begin(client, key)
    assert client.post(url, headers=key, json=ask | {"size": 5}).status_code == 409
    for number in range(2):
        begin(client, key, sha256=f"{number:064x}", size=5)
    full = client.post(url, headers=key, json={"sha256": "e" * 64, "size": 5})
    assert (full.status_code, full.json()["code"]) == (409, "too_many_uploads")
    listed = client.get(url, headers=key).json()["items"]
    assert [item["size"] for item in listed] == [5, 5, len(DATA)]


def test_begun_by_many_at_once_is_one(client: TestClient, key: Key, store: BlobStore) -> None:
    with ThreadPoolExecutor(6) as pool:
        ids = set(pool.map(lambda _: begin(client, key)["id"], range(6)))
    assert len(ids) == 1
    assert store.remove_stale_uploads(older_than_s=-1) == 1, "the losers left nothing"


def test_another_tenants_upload_is_none(client: TestClient, key: Key, make_tenant: MakeTenant) -> None:
    upload, other = begin(client, key), bearer(make_tenant("other"))
    url = f"/api/v1/uploads/{upload['id']}"
    tries = [client.get(url, headers=other), client.delete(url, headers=other), client.post(f"{url}/complete", headers=other)]
    tries += [client.put(f"{url}/parts/1", headers=other, content=b"x"), client.post(f"{url}/parts", headers=other, json={"numbers": [1]})]
    assert {response.status_code for response in tries} == {404}
    assert begin(client, other)["id"] != upload["id"]


class TestFinaliserThatDied:
    """Whatever an attempt did before it died, the next one ends it."""

    def parted(self, client: TestClient, key: Key, database: Database) -> Any:
        upload = begin(client, key)
        send(client, key, upload, 1, 2, 3)
        with database.system_read() as session:
            row = session.get(LargeUpload, upload["id"])
            assert row is not None
            return row.parted

    def test_at_any_chunk(self, client: TestClient, key: Key, database: Database, store: BlobStore) -> None:
        parted = self.parted(client, key, database)
        for moment in (0, 4, 10):
            checks = iter(range(moment))
            with pytest.raises(StopIteration):
                store.finalise(parted, sha256=SHA, check=partial(next, checks))
            assert store.size(parted.tenant_id, SHA) is None
        store.finalise(parted, sha256=SHA, check=lambda: None)
        assert b"".join(store.stream(parted.tenant_id, SHA)) == DATA

    def test_after_the_copy(self, client: TestClient, key: Key, database: Database, store: BlobStore) -> None:
        parted = self.parted(client, key, database)
        for _ in range(2):
            store.finalise(parted, sha256=SHA, check=lambda: None)
        assert b"".join(store.stream(parted.tenant_id, SHA)) == DATA

    def test_parts_that_are_gone(self, client: TestClient, key: Key, database: Database, store: BlobStore) -> None:
        parted = self.parted(client, key, database)
        store.discard_parts(parted)
        with pytest.raises(UploadLost):
            store.finalise(parted, sha256=SHA, check=lambda: None)

    def test_onto_damaged_bytes(self, client: TestClient, key: Key, *, database: Database, store: BlobStore, settings: Settings) -> None:
        """The address holds something else of the same size: what was hashed replaces it."""
        parted = self.parted(client, key, database)
        if isinstance(store, S3BlobStore):
            store._bucket.call("put_object", store._bucket.blob_key(parted.tenant_id, SHA), Body=bytes(len(DATA)))
        else:
            (settings.blob_dir / parted.tenant_id).mkdir()
            (settings.blob_dir / parted.tenant_id / SHA).write_bytes(bytes(len(DATA)))
        store.finalise(parted, sha256=SHA, check=lambda: None)
        assert b"".join(store.stream(parted.tenant_id, SHA)) == DATA
