"""Files of one commit of a hub onto this disk: resumed where they broke off, named once their digest is right."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from registry.blobs.store import CHUNK_BYTES
from registry.outbound import OutboundFailed
from workers.hub_source import HubCommit, HubFile, HubSource
from workers.progress import Progress
from workers.shell import Attempt


@dataclass(frozen=True)
class Fetch:
    """Brings files of one commit into one folder."""

    source: HubSource
    commit: HubCommit
    folder: Path
    progress: Progress
    attempt: Attempt

    def file(self, file: HubFile) -> None:
        """Under its name once it is whole and right. Raises OutboundFailed; what has come by then stays."""
        target, unfinished = self.folder / file.path, self.folder / f"{file.path}.part"
        self.progress.file, base = file.path, self.progress.done_bytes
        if not target.is_file():
            with unfinished.open("ab+") as opened:
                part = Part(opened, file)
                while part.position < file.size:
                    self._go_on(file, part, base=base)
                is_right = part.is_right()
                opened.flush()
                os.fsync(opened.fileno())
            if not is_right:
                unfinished.unlink()
                raise OutboundFailed("protocol", f"the bytes of {file.path} are not those that the hub announced")
            unfinished.rename(target)
        self.progress.reach(base + file.size)

    def _go_on(self, file: HubFile, part: Part, *, base: int) -> None:
        """A connection that breaks after bytes have come is followed by the next at once; a hub that sends none has failed."""
        start = part.position
        try:
            with self.source.open(self.commit, file, start=start) as (begins, chunks):
                if begins != start:
                    part.restart()
                for chunk in chunks:
                    self.attempt.check()
                    part.write(chunk)
                    self.progress.reach(base + part.position)
        except OutboundFailed:
            if part.position <= start:
                raise
        if part.position <= start:
            raise OutboundFailed("protocol", f"the hub sends no more of {file.path} after {start} of {file.size} bytes")


class Part:
    """What has come of a file, and the digest over it: by sha256, by git's id of it, or, where a hub tells neither, by size.

    `opened` appends, and may hold what came before: it is read once.
    """

    def __init__(self, opened: BinaryIO, file: HubFile) -> None:
        self._opened, self._file = opened, file
        self._begin()
        if opened.seek(0, os.SEEK_END) > file.size:
            self.restart()
        opened.seek(0)
        while chunk := opened.read(CHUNK_BYTES):
            self._count(chunk)

    def restart(self) -> None:
        self._opened.truncate(0)
        self._begin()

    def _begin(self) -> None:
        self.position = 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)

    def write(self, chunk: bytes) -> None:
        if self.position + len(chunk) > self._file.size:
            raise OutboundFailed("too_large", f"{self._file.path} is larger than the hub announced")
        self._opened.write(chunk)
        self._count(chunk)

    def is_right(self) -> bool:
        if self._file.sha256 is not None:
            return self._sha256.hexdigest() == self._file.sha256
        return self._file.git_oid in {None, self._git.hexdigest()}

    def _count(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        self._git.update(chunk)
        self.position += len(chunk)
