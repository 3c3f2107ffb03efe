"""API keys at rest: `<state_dir>/credentials.json`, mode 0600, one key a registry URL.

A key is only ever sent to the URL that it was stored for. The file is refused when others can read it.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path

from registry.cli.failure import CliFailure

FILE_NAME = "credentials.json"


def credentials_file(state_dir: Path) -> Path:
    return state_dir / FILE_NAME


def load_key(state_dir: Path, url: str) -> str | None:
    """The key stored for `url`, or None. Raises CliFailure when the file is readable by others or not ours."""
    return _load(credentials_file(state_dir)).get(url)


def store_key(state_dir: Path, url: str, key: str) -> Path:
    """Keep `key` for `url`; replaces the file in one step."""
    path = credentials_file(state_dir)
    write_secret(path, json.dumps({**_load(path), url: key}, indent=2, sort_keys=True) + "\n")
    return path


def forget_key(state_dir: Path, url: str) -> bool:
    """True when there was a key for `url`."""
    path = credentials_file(state_dir)
    keys = _load(path)
    if keys.pop(url, None) is None:
        return False
    write_secret(path, json.dumps(keys, indent=2, sort_keys=True) + "\n")
    return True


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
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_secret(path: Path) -> str | None:
    """The text of a secret file, None where there is none. Raises CliFailure when others can read it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise CliFailure(f"{path} is readable by others (mode {mode:04o})", remedy=f"chmod 600 {path}, and replace the keys in it")
        return path.read_text()
    except FileNotFoundError:
        return None


def _load(path: Path) -> dict[str, str]:
    text = read_secret(path)
    if text is None:
        return {}
    try:
        keys = json.loads(text)
        if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
            raise ValueError("not an object of strings")
    except ValueError as error:
        raise CliFailure(f"{path} is not a credentials file: {error}", remedy=f"delete {path} and run `lorary keys login`") from error
    return keys
