"""The disk tier: forms by (tenant, form digest) in a folder that several processes may share.

    <root>/<first 16 hex of sha256(tenant)>-<form digest>/    an entry; complete since it appeared (one atomic rename)
        entry.json                                            {"manifest", "tenant", "version_digest"}
        <sha256>                                              one file a blob
    <root>/tmp-<random>/                                      being written, or being removed

Nothing read back is believed: the form digest and every sha256 are checked on each load, and an entry that fails is
dropped, so that it is pulled again. Least recently used first out: an entry's modification time is its last use, which
processes share. Used by pull threads only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from pathlib import Path

from gpu_runtime.adapters.form import BlobBuffer, Form, verify_manifest
from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import AdapterKey

log = logging.getLogger(__name__)

TEMPORARY = "tmp-"
STALE_S = 3600.0  # a temporary folder older than this belongs to a process that died


class DiskCache:
    """Keeps at most `max_bytes` of blobs below `root`. Raises OSError where the folder cannot be made."""

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # of _keys
        self._writing = threading.Lock()  # entries come and go one at a time in this process; other processes share by renames
        root.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        self._keys = {key: path for path in self._entries() if (key := _read_key(path)) is not None}

    def keys(self) -> tuple[AdapterKey, ...]:
        """What this process knows to be here. Any thread."""
        with self._lock:
            return tuple(self._keys)

    def load(self, key: AdapterKey) -> Form | None:
        """The verified form, or None: not here, or corrupt (then it is dropped)."""
        path = self._path(key)
        try:
            form = _read(path, key)
            os.utime(path)
        except FileNotFoundError:
            if path.is_dir():
                log.warning("disk_cache.incomplete", extra={"form_digest": key.form_digest})
                self.drop(key)
            self._forget(key)
            return None
        except (AdapterUnavailable, OSError, ValueError) as error:
            log.warning("disk_cache.corrupt", extra={"form_digest": key.form_digest, "reason": str(error)})
            self.drop(key)
            return None
        with self._lock:
            self._keys[key] = path
        return form

    def insert(self, form: Form) -> bool:
        """Keep `form`, evicting older entries. False, with nothing left behind, where the disk or the budget has no room for it."""
        if form.num_bytes > self._max_bytes:
            return False
        with self._writing:
            return self._insert(form)

    def drop(self, key: AdapterKey) -> None:
        """Remove an entry. Absent ones are fine."""
        with self._writing:
            self._forget(key)
            self._remove(self._path(key))

    def check_integrity(self) -> None:
        """Every known entry is complete and verified, and together they keep the budget."""
        for key in self.keys():
            _read(self._path(key), key)
        total = sum(_size(path) for path in self._entries())
        assert total <= self._max_bytes, f"{total} bytes are kept, the budget is {self._max_bytes}"

    def _insert(self, form: Form) -> bool:
        temporary: Path | None = None
        try:
            self._make_room(form.num_bytes, keep=self._path(form.key))
            temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self._root))
            _write(temporary, form)
            self._publish(temporary, form.key)
            self._make_room(0, keep=self._path(form.key))  # another process may have written meanwhile
        except OSError as error:
            log.warning("disk_cache.not_written", extra={"form_digest": form.key.form_digest, "reason": str(error)})
            return False
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _publish(self, temporary: Path, key: AdapterKey) -> None:
        path = self._path(key)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            os.utime(path)  # another process was faster; whoever reads it verifies it
        _sync_folder(self._root)
        with self._lock:
            self._keys[key] = path

    def _make_room(self, num_bytes: int, *, keep: Path) -> None:
        aged = []
        for path in self._entries():
            try:
                aged.append((path.stat().st_mtime_ns, _size(path), path))
            except FileNotFoundError:
                continue  # another process evicted it
        total = sum(size for _, size, _ in aged) + num_bytes
        for _, size, path in sorted(aged):
            if total <= self._max_bytes:
                return
            if path != keep:
                self._evict(path)
                total -= size

    def _evict(self, path: Path) -> None:
        with self._lock:
            for key in [key for key, known in self._keys.items() if known == path]:
                del self._keys[key]
        self._remove(path)
        log.info("disk_cache.evicted", extra={"entry": path.name})

    def _remove(self, path: Path) -> None:
        """Rename first, so that no reader ever meets half an entry under its name."""
        doomed = self._root / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def _forget(self, key: AdapterKey) -> None:
        with self._lock:
            self._keys.pop(key, None)

    def _path(self, key: AdapterKey) -> Path:
        return self._root / f"{hashlib.sha256(key.tenant.encode()).hexdigest()[:16]}-{key.form_digest}"

    def _entries(self) -> list[Path]:
        return [path for path in self._root.iterdir() if path.is_dir() and not path.name.startswith(TEMPORARY)]

    def _remove_stale(self) -> None:
        for path in self._root.glob(f"{TEMPORARY}*"):
            try:
                stale = time.time() - path.stat().st_mtime > STALE_S
            except FileNotFoundError:
                continue
            if stale:
                shutil.rmtree(path, ignore_errors=True)


def _read_key(path: Path) -> AdapterKey | None:
    try:
        tenant = json.loads((path / "entry.json").read_bytes())["tenant"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return AdapterKey(str(tenant), path.name.partition("-")[2])


def _read(path: Path, key: AdapterKey) -> Form:
    entry = json.loads((path / "entry.json").read_bytes())
    if not isinstance(entry, dict) or entry.get("tenant") != key.tenant:
        raise ValueError("entry.json names another tenant")
    manifest = verify_manifest(key, entry["manifest"]) if "manifest" in entry else None
    if manifest is None:
        raise ValueError("entry.json has no manifest")
    blobs = {name: _read_blob(path, name, sha256=blob.sha256, size=blob.size) for name, blob in manifest.blobs.items()}
    return Form(key, str(entry.get("version_digest", "")), manifest, blobs)


def _read_blob(path: Path, name: str, *, sha256: str, size: int) -> bytes:
    buffer = BlobBuffer(name, sha256=sha256, size=size)
    with (path / sha256).open("rb") as file:
        while chunk := file.read(1 << 20):
            buffer.write(chunk)
    return buffer.finish()


def _write(folder: Path, form: Form) -> None:
    entry = {"manifest": form.manifest.to_json(), "tenant": form.key.tenant, "version_digest": form.version_digest}
    _write_file(folder / "entry.json", json.dumps(entry, sort_keys=True).encode())
    for name, blob in form.blobs.items():
        _write_file(folder / form.manifest.blobs[name].sha256, blob)
    _sync_folder(folder)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.name != "entry.json")
