"""API keys at rest: `<state_dir>/credentials.json`, mode 0600, one key a registry.

A key is only ever sent to the registry that it was stored for: a URL, or whatever `lorary up` runs on this state
directory, whose port may change. The file is refused when others can read it.
"""

from __future__ import annotations

import json
from pathlib import Path

from registry.cli.failure import CliFailure
from registry.cli.secrets_file import read_secret, write_secret
from registry.cli.state import read_up

FILE_NAME = "credentials.json"
RUNNING_HERE = "lorary up"


def credentials_file(state_dir: Path) -> Path:
    return state_dir / FILE_NAME


def load_key(state_dir: Path, url: str) -> str | None:
    """The key stored for `url`, or None. Raises CliFailure when the file is readable by others or not ours."""
    return _load(credentials_file(state_dir)).get(_entry(state_dir, url))


def store_key(state_dir: Path, url: str, key: str) -> Path:
    """Keep `key` for `url`; replaces the file in one step."""
    path = credentials_file(state_dir)
    write_secret(path, json.dumps({**_load(path), _entry(state_dir, url): key}, indent=2, sort_keys=True) + "\n")
    return path


def store_key_of_running(state_dir: Path, key: str) -> Path:
    """Keep `key` for whatever `lorary up` runs on this state directory."""
    path = credentials_file(state_dir)
    write_secret(path, json.dumps({**_load(path), RUNNING_HERE: key}, indent=2, sort_keys=True) + "\n")
    return path


def forget_key(state_dir: Path, url: str) -> bool:
    """True when there was a key for `url`."""
    path = credentials_file(state_dir)
    keys = _load(path)
    if keys.pop(_entry(state_dir, url), None) is None:
        return False
    write_secret(path, json.dumps(keys, indent=2, sort_keys=True) + "\n")
    return True


def _entry(state_dir: Path, url: str) -> str:
    running = read_up(state_dir)
    return RUNNING_HERE if running is not None and running.url == url else url


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
