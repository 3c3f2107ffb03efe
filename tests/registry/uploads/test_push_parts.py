"""What `lorary adapters push` does with large files, over real HTTP: several parts at once, resumed, tried again."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.blobs.store import BlobStore
from registry.cli.client import RegistryClient
from registry.cli.failure import CliFailure
from registry.cli.output import Output
from registry.cli.parts import upload_parts
from registry.cli.push import LocalFile, _upload_one
from registry.cli.remote import Call
from registry.config import Settings
from registry.db import Database
from registry.jobs.service import FINALISE_UPLOAD
from tests.registry.blobs.gate import Gate
from tests.registry.uploads.conftest import PART
from workers.finalise import UploadFinaliser
from workers.shell import JobKind, Worker

DATA = random.Random(2).randbytes(3 * PART + 99)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def worker(database: Database, store: BlobStore) -> Iterator[None]:
    finaliser, stop = UploadFinaliser(database, store), threading.Event()
    worker = Worker(database, kinds={FINALISE_UPLOAD: JobKind(run=finaliser.run, give_up=finaliser.give_up)}, lease_s=30, poll_s=0.1)
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.fixture
def call(server_url: str, key: dict[str, str], tmp_path: Path) -> Iterator[Call]:
    with RegistryClient(server_url, token=key["Authorization"].removeprefix("Bearer ")) as client:
        yield Call(client=client, output=Output(), state_dir=tmp_path)


def push(call: Call, file: Path, *, sha256: str = SHA) -> int:
    sent: list[int] = []
    upload_parts(call, file, sha256=sha256, size=len(DATA), advance=sent.append)
    return sum(sent)


def test_a_file_in_parts(call: Call, file: Path, worker: None, store: BlobStore) -> None:
    assert push(call, file) == len(DATA)
    [blob] = store.list()
    assert b"".join(store.stream(blob.tenant_id, SHA)) == DATA
    assert store.remove_stale_uploads(older_than_s=-1) == 0


def test_a_file_that_is_not_what_was_hashed(call: Call, file: Path, worker: None, store: BlobStore) -> None:
    with pytest.raises(CliFailure, match="rejected"):
        push(call, file, sha256="0" * 64)
    assert list(store.list()) == []


class TestARegistryThatTakesLittleAtOnce:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_inline_blob_bytes": 1000})

    def test_parts_are_tried(self, call: Call, file: Path, worker: None, store: BlobStore) -> None:
        sent: list[int] = []
        _upload_one(call, LocalFile(source=file, sha256=SHA, size=len(DATA)), sent.append)
        assert sum(sent) == len(DATA)
        assert [(blob.sha256, blob.size) for blob in store.list()] == [(SHA, len(DATA))]


def test_going_on_after_an_interruption(call: Call, file: Path, worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put_part, arrived = RegistryClient.put_part, []

    def put_two(client: RegistryClient, url: str, data: bytes) -> None:
        if len(arrived) == 2:
            raise KeyboardInterrupt
        arrived.append(len(data))
        put_part(client, url, data)

    monkeypatch.setattr("registry.cli.parts.PARTS_AT_ONCE", 1)
    monkeypatch.setattr(RegistryClient, "put_part", put_two)
    with pytest.raises(KeyboardInterrupt):
        push(call, file)
    arrived.clear()
    assert push(call, file) == len(DATA)
    assert sum(arrived) == len(DATA) - 2 * PART, "only what was missing"


def test_broken_connections_cost_no_bytes(
    server_url: str, key: dict[str, str], *, file: Path, worker: None, store: BlobStore, tmp_path: Path
) -> None:
    """The way to the registry breaks in the middle and comes back; whoever pushes again ends with the same blob."""
    with Gate(server_url) as gate, RegistryClient(gate.url, token=key["Authorization"].removeprefix("Bearer ")) as client:
        breaker = threading.Thread(target=_break_for_a_while, args=(gate,))
        breaker.start()
        call = Call(client=client, output=Output(), state_dir=tmp_path)
        _push_until_it_lasts(lambda: push(call, file))
        breaker.join()
    [blob] = store.list()
    assert b"".join(store.stream(blob.tenant_id, SHA)) == DATA


def _break_for_a_while(gate: Gate) -> None:
    time.sleep(0.05)
    gate.close()
    time.sleep(0.3)
    gate.open()


def _push_until_it_lasts(push: Callable[[], int]) -> None:
    for _ in range(20):
        try:
            push()
        except CliFailure:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("it never went through")
