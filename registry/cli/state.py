"""What `lorary up` writes into its state directory for other commands: `up.json`, and the lock that makes it the only one."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from registry.cli.failure import CliFailure
from registry.cli.secrets_file import write_secret


@dataclass(frozen=True)
class ChildState:
    """One process of the supervisor. `pid` is None while it is down, between a crash and its restart."""

    name: str
    pid: int | None
    url: str | None
    num_restarts: int


@dataclass(frozen=True)
class UpState:
    """A running `lorary up`: its own pid, the registry's address, its processes."""

    pid: int
    url: str
    children: tuple[ChildState, ...]


def up_file(state_dir: Path) -> Path:
    return state_dir / "up.json"


def write_up(state_dir: Path, state: UpState) -> None:
    write_secret(up_file(state_dir), json.dumps(asdict(state), indent=2) + "\n")


def remove_up(state_dir: Path) -> None:
    up_file(state_dir).unlink(missing_ok=True)


def read_up(state_dir: Path) -> UpState | None:
    """What the last supervisor wrote; None when there is none, or the one that wrote it is gone."""
    try:
        raw = json.loads(up_file(state_dir).read_text())
        state = UpState(pid=raw["pid"], url=raw["url"], children=tuple(ChildState(**child) for child in raw["children"]))
    except (FileNotFoundError, PermissionError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CliFailure(f"{up_file(state_dir)} cannot be read: {error}", remedy="delete it; `lorary up` writes a new one") from error
    return state if is_locked(state_dir) else None


def lock_file(state_dir: Path) -> Path:
    return state_dir / "up.lock"


def take_lock(state_dir: Path) -> IO[str]:
    """Hold the state directory for as long as the returned file is open; the kernel lets go when we die.

    Raises CliFailure when another supervisor holds it, naming its pid.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = lock_file(state_dir).open("a+")
    if not _try_lock(file, tries=5):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise CliFailure(
            f"another `lorary up` (pid {holder}) runs on {state_dir}",
            remedy="stop it, or give this one its own LORARY_STATE_DIR",
        )
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _try_lock(file: IO[str], *, tries: int) -> bool:
    """Several tries: `is_locked` of another command holds a shared lock for a moment."""
    for _ in range(tries):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def is_locked(state_dir: Path) -> bool:
    """Does a supervisor hold the state directory right now?"""
    try:
        with lock_file(state_dir).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
