"""What every BlobStore must do. A subclass gives the fixture `store`; see test_local.py."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from registry.blobs.store import CHUNK_BYTES, BlobMissing, BlobStore
from registry.errors import Invalid, TooLarge

ONE, TWO = "1" * 32, "2" * 32
MAX = 8 * CHUNK_BYTES


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: BlobStore, tenant_id: str, data: bytes, *, sha256: str | None = None, max_bytes: int = MAX) -> str:
    address = sha256 or digest(data)
    upload = store.begin(tenant_id, address, max_bytes=max_bytes)
    try:
        for start in range(0, len(data), 1000):
            upload.write(data[start : start + 1000])
        upload.commit()
    finally:
        upload.abort()
    return address


def contents(store: BlobStore, tenant_id: str | None = None) -> set[tuple[str, str, int]]:
    return {(blob.tenant_id, blob.sha256, blob.size) for blob in store.list(tenant_id)}


class BlobStoreConformance:
    leaves_a_trace = 2  # bytes of an unfinished upload that are outside this process

    @pytest.mark.parametrize("data", [b"", b"x", b"abc" * 5000], ids=["empty", "one byte", "several writes"])
    def test_bytes_come_back(self, store: BlobStore, data: bytes) -> None:
        address = put(store, ONE, data)
        assert store.size(ONE, address) == len(data)
        with store.open(ONE, address) as file:
            assert file.read() == data
        assert b"".join(store.stream(ONE, address)) == data

    def test_open_seeks(self, store: BlobStore) -> None:
        address = put(store, ONE, b"0123456789")
        with store.open(ONE, address) as file:
            file.seek(4)
            assert file.read(3) == b"456"
            file.seek(0)
            assert file.read(2) == b"01"

    @pytest.mark.parametrize(("start", "length", "expected"), [(0, 3, b"012"), (7, None, b"789"), (7, 99, b"789"), (3, 0, b"")])
    def test_stream_takes_a_range(self, store: BlobStore, start: int, length: int | None, expected: bytes) -> None:
        address = put(store, ONE, b"0123456789")
        assert b"".join(store.stream(ONE, address, start=start, length=length)) == expected

    def test_stream_is_bounded(self, store: BlobStore) -> None:
        data = bytes(3 * CHUNK_BYTES + 5)
        sizes = [len(chunk) for chunk in store.stream(ONE, put(store, ONE, data))]
        assert sum(sizes) == len(data)
        assert max(sizes) <= CHUNK_BYTES

    def test_nothing_is_visible_before_commit(self, store: BlobStore) -> None:
        address = digest(b"data")
        upload = store.begin(ONE, address, max_bytes=MAX)
        upload.write(b"data")
        assert store.size(ONE, address) is None
        assert contents(store) == set()
        upload.commit()
        upload.abort()
        assert contents(store) == {(ONE, address, 4)}

    def test_abort_leaves_nothing(self, store: BlobStore) -> None:
        upload = store.begin(ONE, digest(b"data"), max_bytes=MAX)
        upload.write(b"da")
        upload.abort()
        upload.abort()
        assert contents(store) == set()
        assert store.remove_stale_uploads(older_than_s=-1) == 0

    def test_a_wrong_digest_keeps_nothing(self, store: BlobStore) -> None:
        address = digest(b"other")
        with pytest.raises(Invalid) as refused:
            put(store, ONE, b"data", sha256=address)
        assert refused.value.error_code == "digest_mismatch"
        assert store.size(ONE, address) is None
        assert store.size(ONE, digest(b"data")) is None

    def test_a_byte_too_many_keeps_nothing(self, store: BlobStore) -> None:
        assert put(store, ONE, b"12345", max_bytes=5)
        with pytest.raises(TooLarge):
            put(store, ONE, b"123456", max_bytes=5)
        assert contents(store) == {(ONE, digest(b"12345"), 5)}

    def test_tenants_share_nothing(self, store: BlobStore) -> None:
        address = put(store, ONE, b"data")
        assert store.size(TWO, address) is None
        with pytest.raises(BlobMissing):
            store.open(TWO, address)
        put(store, TWO, b"data")
        assert store.delete(ONE, address)
        assert store.size(TWO, address) == 4
        assert contents(store, ONE) == set()
        assert contents(store, TWO) == contents(store) == {(TWO, address, 4)}

    def test_missing_blobs(self, store: BlobStore) -> None:
        absent = digest(b"never")
        assert store.size(ONE, absent) is None
        assert not store.delete(ONE, absent)
        with pytest.raises(BlobMissing):
            store.open(ONE, absent)
        with pytest.raises(BlobMissing):
            store.stream(ONE, absent)  # at the call, so that an endpoint can still answer 404

    def test_uploading_again_is_harmless(self, store: BlobStore) -> None:
        address = put(store, ONE, b"data")
        with store.open(ONE, address) as reader:
            put(store, ONE, b"data")
            assert reader.read() == b"data", "a reader in the middle keeps its bytes"
        assert contents(store) == {(ONE, address, 4)}

    def test_many_uploads_of_one_blob_at_once(self, store: BlobStore) -> None:
        data = bytes(range(256)) * 2000
        with ThreadPoolExecutor(8) as pool:
            addresses = list(pool.map(lambda _: put(store, ONE, data), range(16)))
        assert set(addresses) == {digest(data)}
        assert b"".join(store.stream(ONE, addresses[0])) == data
        assert contents(store) == {(ONE, digest(data), len(data))}

    def test_stale_uploads_go_and_running_ones_stay(self, store: BlobStore) -> None:
        abandoned = store.begin(ONE, digest(b"data"), max_bytes=2 * MAX)
        abandoned.write(bytes(self.leaves_a_trace))
        assert store.remove_stale_uploads(older_than_s=3600) == 0
        assert store.remove_stale_uploads(older_than_s=-1) == 1
        abandoned.abort()

    def test_writable(self, store: BlobStore) -> None:
        store.check_writable()
        assert contents(store) == set()
