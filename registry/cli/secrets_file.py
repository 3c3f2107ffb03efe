"""Files that only their owner reads: written in one step, refused when they lie open."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from registry.cli.failure import CliFailure


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner reads: complete or not at all, and never readable in between."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp gives 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # nothing is there any more once it was renamed


def read_secret(path: Path) -> str | None:
    """The text of a secret file, None where there is none. Raises CliFailure when others can read it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise CliFailure(f"{path} is readable by others (mode {mode:04o})", remedy=f"chmod 600 {path}, and replace the keys in it")
        return path.read_text()
    except FileNotFoundError:
        return None
