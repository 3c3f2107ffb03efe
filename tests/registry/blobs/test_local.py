"""LocalBlobStore: the conformance suite, and what only a directory can get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from registry.blobs.local import LocalBlobStore
from registry.blobs.store import BlobStore
from registry.errors import StorageFull
from tests.registry.blobs.conformance import ONE, BlobStoreConformance, contents, digest, put


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return LocalBlobStore(tmp_path / "blobs")


class TestLocalBlobStore(BlobStoreConformance):
    pass


def test_lies_under_tenant_and_digest(tmp_path: Path, store: BlobStore) -> None:
    address = put(store, ONE, b"data")
    assert (tmp_path / "blobs" / ONE / address).read_bytes() == b"data"


def test_strangers_among_the_files_are_no_blobs(tmp_path: Path, store: BlobStore) -> None:
    put(store, ONE, b"data")
    (tmp_path / "blobs" / ONE / "lost+found").mkdir()
    (tmp_path / "blobs" / ONE / "notes.txt").write_text("x")
    assert contents(store) == {(ONE, digest(b"data"), 4)}


def test_uploading_again_heals_damage(tmp_path: Path, store: BlobStore) -> None:
    address = put(store, ONE, b"data")
    (tmp_path / "blobs" / ONE / address).write_bytes(b"dust")
    put(store, ONE, b"data")
    assert b"".join(store.stream(ONE, address)) == b"data"


@pytest.mark.parametrize("tenant_id", ["", "..", "a/b", ".uploads", "a" * 65])
def test_keys_never_leave_the_directory(store: BlobStore, tenant_id: str) -> None:
    with pytest.raises(AssertionError):
        store.size(tenant_id, "0" * 64)


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_addresses_are_digests(store: BlobStore, sha256: str) -> None:
    with pytest.raises(AssertionError):
        store.open(ONE, sha256)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from registry.blobs.local import LocalBlobStore
from registry.errors import StorageFull
store = LocalBlobStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
upload = store.begin("1" * 32, sys.argv[2], max_bytes=2**20)
try:
    upload.write(bytes(10000))
except StorageFull as full:
    upload.abort()
    print(full.status, full.error_code)
"""


def test_a_disk_that_takes_no_more_keeps_nothing(tmp_path: Path) -> None:
    """A real refusal of the kernel: the process may write no file above 4096 bytes."""
    root = tmp_path / "blobs"
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(root), digest(bytes(10000))], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["507", "storage_full"], run.stderr
    assert [path for path in root.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_space_left_on_device(store: LocalBlobStore) -> None:
    """ENOSPC itself: the upload's file is swapped for the device that is always full."""
    upload = store.begin(ONE, digest(b"data"), max_bytes=100)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, upload._file.fileno())
    os.close(full)
    with pytest.raises(StorageFull):
        upload.write(b"data")
    upload.abort()
    assert contents(store) == set()
    assert store.remove_stale_uploads(older_than_s=-1) == 0
