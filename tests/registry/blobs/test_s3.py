"""S3BlobStore on a real SeaweedFS: the conformance suite, what only a remote store can get wrong, and its faults."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from registry.blobs.s3 import S3BlobStore
from registry.blobs.s3_upload import PART_BYTES
from registry.blobs.store import BlobMissing, BlobStore
from registry.config import S3Settings
from registry.errors import Invalid, Unavailable
from tests.registry.blobs.conformance import ONE, BlobStoreConformance, contents, digest, put
from tests.registry.blobs.conftest import MakeS3
from tests.registry.blobs.gate import Gate
from tests.registry.places import Place, s3_settings
from tests.servers import S3_READER, S3Server

BIG = os.urandom(2 * PART_BYTES + 12345)


@pytest.fixture
def store(make_s3: MakeS3) -> BlobStore:
    return make_s3()


class TestS3BlobStore(BlobStoreConformance):
    leaves_a_trace = PART_BYTES + 1


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_lies_under_prefix_tenant_and_digest(store: BlobStore, place: Place) -> None:
    address = put(store, ONE, b"data")
    assert place.keys() == [f"{ONE}/{address}"]


def test_strangers_among_the_objects_are_no_blobs(store: BlobStore, place: Place) -> None:
    address = put(store, ONE, b"data")
    for key in (f"other/{ONE}/{address}", f"{ONE}/notes.txt", f"{ONE}/uploads/{'a' * 32}", address):
        place.put(key, b"x")
    assert contents(store) == {(ONE, address, 4)}


def send(store: BlobStore, data: bytes, *, sha256: str) -> None:
    upload = store.begin(ONE, sha256, max_bytes=len(data))
    try:
        for start in range(0, len(data), 1 << 20):
            upload.write(data[start : start + (1 << 20)])
        upload.commit()
    finally:
        upload.abort()


def test_larger_ones_travel_in_parts_and_come_back(store: BlobStore, place: Place) -> None:
    address = digest(BIG)
    send(store, BIG, sha256=address)
    assert b"".join(store.stream(ONE, address)) == BIG
    assert place.multiparts() == 0
    with store.open(ONE, address) as file:
        assert file.read(8) == BIG[:8]
        file.seek(-5, os.SEEK_END)
        assert file.read() == BIG[-5:]
        file.seek(PART_BYTES - 2)
        assert file.read(3 << 20) == BIG[PART_BYTES - 2 : PART_BYTES - 2 + (3 << 20)]
        assert file.seek(len(BIG) + 7) == len(BIG) + 7
        assert file.read(1) == b""


def test_a_wrong_digest_in_parts_keeps_nothing(store: BlobStore, place: Place) -> None:
    with pytest.raises(Invalid):
        send(store, BIG, sha256=digest(b"other"))
    wait_until(lambda: place.multiparts() == 0)
    assert place.keys() == []


def test_larger_ones_at_once_and_again(store: BlobStore, place: Place) -> None:
    address = digest(BIG)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: send(store, BIG, sha256=address), range(3)))
    assert contents(store) == {(ONE, address, len(BIG))}
    assert b"".join(store.stream(ONE, address)) == BIG
    wait_until(lambda: place.multiparts() == 0)


@pytest.mark.parametrize("dust", [b"dust", b"dat", b""], ids=["equal size", "shorter", "empty"])
def test_uploading_again_heals_damage(store: BlobStore, place: Place, dust: bytes) -> None:
    """The conditional put says that something is there; only its bytes say whether it is the right thing."""
    address = digest(b"data")
    place.put(f"{ONE}/{address}", dust)
    put(store, ONE, b"data")
    assert b"".join(store.stream(ONE, address)) == b"data"


def test_damage_shows_to_whoever_hashes(store: BlobStore, place: Place) -> None:
    address = put(store, ONE, b"data")
    place.put(f"{ONE}/{address}", b"dust")
    assert hashlib.sha256(b"".join(store.stream(ONE, address))).hexdigest() != address


def test_download_url_opens_one_blob_for_a_while(store: BlobStore) -> None:
    address = put(store, ONE, b"0123456789")
    url = store.download_url(ONE, address, ttl_s=60)
    assert url is not None
    assert httpx2.get(url, headers={"Range": "bytes=2-4"}).content == b"234"
    assert httpx2.put(url, content=b"mine now").status_code == 403
    assert httpx2.get(url.replace(address, digest(b"other"))).status_code == 403
    brief = store.download_url(ONE, address, ttl_s=1)
    assert brief is not None
    time.sleep(2.1)
    assert httpx2.get(brief).status_code == 403
    assert b"".join(store.stream(ONE, address)) == b"0123456789"


def test_server_side_encryption(make_s3: MakeS3, place: Place) -> None:
    store = make_s3(encryption="AES256")
    for data in (b"data", BIG):
        send(store, data, sha256=digest(data))
        assert place.head(f"{ONE}/{digest(data)}")["ServerSideEncryption"] == "AES256"
        assert b"".join(store.stream(ONE, digest(data))) == data


class TestFaults:
    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"access_key_id": "nobody"}, "InvalidAccessKeyId"),
            ({"secret_access_key": "wrong"}, "SignatureDoesNotMatch"),
            ({"access_key_id": S3_READER[0], "secret_access_key": S3_READER[1]}, "AccessDenied"),
        ],
        ids=["unknown key", "wrong secret", "reader"],
    )
    def test_a_store_that_refuses_us_says_so(self, make_s3: MakeS3, changes: dict[str, object], code: str) -> None:
        store = make_s3(**changes)
        for act in (store.check_writable, lambda: put(store, ONE, b"data")):
            with pytest.raises(Unavailable) as refused:
                act()
            assert (refused.value.error_code, refused.value.retry_after_s) == ("blob_store_refused", 30)
            assert code in refused.value.detail

    def test_a_reader_reads(self, make_s3: MakeS3) -> None:
        address = put(make_s3(), ONE, b"data")
        reader = make_s3(access_key_id=S3_READER[0], secret_access_key=S3_READER[1])
        assert b"".join(reader.stream(ONE, address)) == b"data"

    def test_no_bucket(self, s3_server: S3Server) -> None:
        store = S3BlobStore("s3://lorary-never-made", s3_settings(s3_server))
        with pytest.raises(Unavailable, match="NoSuchBucket"):
            put(store, ONE, b"data")

    @pytest.mark.parametrize("url", ["s3://", "s3://A", "http://bucket", "s3://un_der/x", "s3://" + "a" * 64])
    def test_urls_that_name_no_bucket(self, url: str) -> None:
        with pytest.raises(ValueError, match="LORARY_BLOB_URL"):
            S3BlobStore(url, S3Settings())

    def test_away_and_back_again(self, make_s3: MakeS3, place: Place) -> None:
        with Gate(place.server.endpoint_url) as gate:
            store = make_s3(endpoint_url=gate.url, max_attempts=1)
            address = put(store, ONE, b"data")
            gate.close()
            for act in (
                lambda: put(store, ONE, b"more"),
                lambda: store.size(ONE, address),
                lambda: store.open(ONE, address),
                lambda: store.stream(ONE, address),
                lambda: list(store.list(ONE)),
                lambda: store.delete(ONE, address),
                store.check_writable,
            ):
                with pytest.raises(Unavailable) as away:
                    act()
                assert away.value.retry_after_s == 2
            gate.open()
            assert b"".join(store.stream(ONE, address)) == b"data"
            assert contents(store) == {(ONE, address, 4)}

    def test_a_broken_download_goes_on_where_it_broke(self, make_s3: MakeS3, place: Place) -> None:
        send(make_s3(), BIG, sha256=digest(BIG))
        with Gate(place.server.endpoint_url) as gate:
            store = make_s3(endpoint_url=gate.url)
            gate.break_replies_after(5 << 20)
            chunks = store.stream(ONE, digest(BIG))
            assert b"".join(chunks) == BIG
            assert gate.broken == 3, "17 MB through connections that break after 5"

    def test_a_download_that_always_breaks_ends(self, make_s3: MakeS3, place: Place) -> None:
        send(make_s3(), BIG, sha256=digest(BIG))
        with Gate(place.server.endpoint_url) as gate:
            store = make_s3(endpoint_url=gate.url)
            gate.break_replies_after(1 << 20)
            with pytest.raises(Unavailable):
                list(store.stream(ONE, digest(BIG)))

    def test_an_upload_that_breaks_keeps_nothing_visible(self, make_s3: MakeS3, place: Place) -> None:
        with Gate(place.server.endpoint_url) as gate:
            store = make_s3(endpoint_url=gate.url, max_attempts=1)
            upload = store.begin(ONE, digest(BIG), max_bytes=len(BIG))
            upload.write(BIG[: PART_BYTES + 5])
            gate.close()
            with pytest.raises(Unavailable):
                upload.write(BIG[PART_BYTES + 5 :])
                upload.commit()
            upload.abort()
            gate.open()
        assert contents(make_s3()) == set()
        assert make_s3().remove_stale_uploads(older_than_s=-1) <= 1
        assert place.multiparts() == 0
        with pytest.raises(BlobMissing):
            make_s3().stream(ONE, digest(BIG))
