"""The disk tier: atomic, verified, bounded, shared."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpu_runtime.adapters import disk as disk_module
from gpu_runtime.adapters.disk import DiskCache
from tests.runtime.adapters.forms import make_form

FORMS = [make_form(seed=at) for at in range(4)]
SIZE = max(form.num_bytes for form in FORMS)


def entries(root: Path) -> list[Path]:
    return sorted(root.iterdir())


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=10 * SIZE)
    assert cache.load(FORMS[0].key) is None
    assert cache.insert(FORMS[0])
    assert cache.load(FORMS[0].key) == FORMS[0]
    assert DiskCache(tmp_path, max_bytes=10 * SIZE).keys() == (FORMS[0].key,)
    cache.check_integrity()


def test_identical_bytes_of_two_tenants_are_two_entries(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=10 * SIZE)
    mine, yours = make_form(tenant="mine"), make_form(tenant="yours")
    assert mine.key.form_digest == yours.key.form_digest
    cache.insert(mine)
    assert cache.load(yours.key) is None
    cache.insert(yours)
    cache.drop(mine.key)
    assert cache.load(mine.key) is None
    assert cache.load(yours.key) == yours


def test_a_tenant_cannot_name_a_folder(tmp_path: Path) -> None:
    form = make_form(tenant="../../outside")
    cache = DiskCache(tmp_path / "cache", max_bytes=10 * SIZE)
    assert cache.insert(form)
    assert cache.load(form.key) == form
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("how", ["flip", "truncate", "grow", "remove", "entry", "no-entry", "manifest", "not-json", "tenant", "directory"])
def test_a_corrupt_entry_is_dropped(tmp_path: Path, how: str) -> None:
    cache = DiskCache(tmp_path, max_bytes=10 * SIZE)
    cache.insert(FORMS[0])
    (folder,) = entries(tmp_path)
    entry = folder / "entry.json"
    blob = folder / FORMS[0].manifest.blobs["adapter_model.safetensors"].sha256
    data = blob.read_bytes()
    changes = {
        "flip": lambda: blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "truncate": lambda: blob.write_bytes(data[:-1]),
        "grow": lambda: blob.write_bytes(data + b"x"),
        "remove": blob.unlink,
        "entry": lambda: entry.write_bytes(b"{}"),
        "no-entry": entry.unlink,
        "manifest": lambda: entry.write_text(entry.read_text().replace("b" * 64, "c" * 64)),
        "not-json": lambda: entry.write_bytes(b"\xff{"),
        "tenant": lambda: entry.write_text(json.dumps(json.loads(entry.read_text()) | {"tenant": "other"})),
        "directory": lambda: (blob.unlink(), blob.mkdir()),
    }
    changes[how]()
    assert cache.load(FORMS[0].key) is None
    assert entries(tmp_path) == []
    assert cache.keys() == ()
    assert cache.insert(FORMS[0])
    assert cache.load(FORMS[0].key) == FORMS[0]


def test_the_least_recently_used_leaves_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=3 * SIZE)
    for at, form in enumerate(FORMS[:3]):
        cache.insert(form)
        os.utime(next(path for path in entries(tmp_path) if path.name.endswith(form.key.form_digest)), (1000 + at, 1000 + at))
    assert cache.load(FORMS[0].key) is not None
    cache.insert(FORMS[3])
    assert set(cache.keys()) == {FORMS[0].key, FORMS[2].key, FORMS[3].key}
    assert cache.load(FORMS[1].key) is None
    cache.check_integrity()


def test_a_form_beyond_the_budget_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=SIZE // 2)
    assert not cache.insert(FORMS[0])
    assert entries(tmp_path) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, max_bytes=10 * SIZE)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_module.os, "fsync", full)
    assert not cache.insert(FORMS[0])
    assert entries(tmp_path) == []
    assert cache.load(FORMS[0].key) is None
    monkeypatch.undo()
    assert cache.insert(FORMS[0])


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    old, young = tmp_path / "tmp-old", tmp_path / "tmp-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half").write_bytes(b"x")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    DiskCache(tmp_path, max_bytes=SIZE)
    assert entries(tmp_path) == [young]


def _hammer(root: str, seed: int) -> None:
    cache = DiskCache(Path(root), max_bytes=2 * SIZE)
    for at in range(40):
        form = FORMS[(at * 7 + seed) % len(FORMS)]
        loaded = cache.load(form.key)
        assert loaded is None or loaded == form
        if loaded is None:
            cache.insert(form)
        if at % 9 == seed:
            cache.drop(form.key)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = DiskCache(tmp_path, max_bytes=4 * SIZE)
    assert not list(tmp_path.glob("tmp-*"))
    assert None not in map(cache.load, cache.keys())


def test_threads_that_insert_at_once_keep_the_budget(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=2 * SIZE)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(cache.insert, FORMS * 4))
    cache.check_integrity()
