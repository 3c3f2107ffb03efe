"""Large uploads on a disk: parts are files in `.uploads/<upload_id>/`, joined and hashed into a new file, then renamed.

A part that arrives late touches its own file alone, never the joined one.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from registry.artifact.digest import is_digest
from registry.blobs.local_files import LocalUpload, NewFile, full_disk_is_an_error, stat_of
from registry.blobs.store import CHUNK_BYTES, STALE_UPLOAD_S, PartedUpload, refuse_part_size, upload_lost
from registry.errors import Invalid

UPLOADS = ".uploads"

_TENANT_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


class LocalPart(NewFile):
    def __init__(self, folder: Path, upload: PartedUpload, number: int) -> None:
        try:
            super().__init__(folder / f".{uuid4().hex}", max_bytes=upload.size_of(number))
        except FileNotFoundError as error:
            raise upload_lost(upload) from error
        self._address = folder / str(number)
        self._upload, self._number = upload, number

    def commit(self) -> int:
        refuse_part_size(self._upload, self._number, found=self._size)
        try:
            return self.publish(self._address)
        except FileNotFoundError as error:
            raise upload_lost(self._upload) from error


class LocalParts:
    """The PartStore half of LocalBlobStore."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._uploads = root / UPLOADS
        self._uploads.mkdir(parents=True, exist_ok=True)

    def begin_parts(self, _tenant_id: str, upload_id: str) -> str:
        with full_disk_is_an_error():
            (self._uploads / upload_id).mkdir()
        return ""

    def part_url(self, _upload: PartedUpload, _number: int, *, ttl_s: int) -> str | None:  # noqa: ARG002 - a disk has no URL
        return None

    def begin_part(self, upload: PartedUpload, number: int) -> LocalPart:
        return LocalPart(self._uploads / upload.upload_id, upload, number)

    def parts(self, upload: PartedUpload) -> dict[int, int]:
        folder = self._uploads / upload.upload_id
        try:
            sizes = {path.name: stat_of(path) for path in folder.iterdir()}
        except FileNotFoundError as error:
            raise upload_lost(upload) from error
        return {int(name): status.st_size for name, status in sizes.items() if name.isdecimal() and status is not None}

    def finalise(self, upload: PartedUpload, *, sha256: str, check: Callable[[], None]) -> None:
        if not (self._uploads / upload.upload_id).is_dir():
            # an earlier attempt got this far and died: a file at an address was renamed there whole
            status = stat_of(self._address(upload.tenant_id, sha256))
            if status is None or status.st_size != upload.size:
                raise upload_lost(upload)
            return
        address = self._address(upload.tenant_id, sha256)
        joined = LocalUpload(self._uploads / uuid4().hex, address, sha256=sha256, max_bytes=upload.size)
        try:
            for chunk in self._joined(upload):
                joined.write(chunk)
                check()
            joined.commit()
        except Invalid:
            self.discard_parts(upload)
            raise
        finally:
            joined.abort()
        self.discard_parts(upload)

    def discard_parts(self, upload: PartedUpload) -> None:
        shutil.rmtree(self._uploads / upload.upload_id, ignore_errors=True)

    def remove_stale_uploads(self, *, older_than_s: float = STALE_UPLOAD_S) -> int:
        """A running upload touches its file or folder, so age is safe to go by."""
        oldest = time.time() - older_than_s
        removed = 0
        for path in self._uploads.iterdir():
            status = stat_of(path)
            if status is not None and status.st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _address(self, tenant_id: str, sha256: str) -> Path:
        assert _TENANT_ID.fullmatch(tenant_id), f"{tenant_id!r} is no tenant id: callers pass ids, never user input"
        assert is_digest(sha256), f"{sha256!r} is no sha256: endpoints check it by pattern"
        return self._root / tenant_id / sha256

    def _joined(self, upload: PartedUpload) -> Iterator[bytes]:
        for number in range(1, upload.num_parts + 1):
            try:
                part = (self._uploads / upload.upload_id / str(number)).open("rb")
            except FileNotFoundError as error:
                raise upload_lost(upload) from error
            with part:
                while chunk := part.read(CHUNK_BYTES):
                    yield chunk
