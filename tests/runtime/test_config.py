"""Settings of a runtime process: flags over variables over defaults, and clear refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gpu_runtime.config import RuntimeConfig


def test_flags_beat_variables_beat_defaults() -> None:
    environ = {"LORARY_RUNTIME_MODEL_DIR": "/m", "LORARY_RUNTIME_MAX_RANK": "8", "LORARY_RUNTIME_POISON_FREED": "1", "PATH": "x"}
    config = RuntimeConfig.from_environment(["--max-rank", "16", "--disk-cache-dir", "/d"], environ=environ)
    assert config == RuntimeConfig(Path("/m"), max_rank=16, poison_freed=True, disk_cache_dir=Path("/d"))
    assert config.url == "http://127.0.0.1:8100"


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        ([], {}, "--model-dir"),
        ([], {"LORARY_RUNTIME_MODEL_DIR": "m", "LORARY_RUNTIME_MAX_RANKS": "8"}, "LORARY_RUNTIME_MAX_RANKS"),
        (["--model-dir", "m", "--port", "x"], {}, "port is 'x'"),
        (["--model-dir", "m", "--port", "70000"], {}, "port is '70000'"),
        (["--model-dir", "m", "--dtype", "int8"], {}, "dtype is 'int8'"),
        (["--model-dir", "m", "--poison-freed", "maybe"], {}, "poison_freed"),
        (["--model-dir", "m", "--pool-bytes", "-1"], {}, "pool_bytes"),
        (["--model-dir", "m", "--max-step-tokens", "8"], {}, "max_step_tokens"),
    ],
)
def test_bad_settings_are_named(argv: list[str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RuntimeConfig.from_environment(argv, environ=environ)


def test_nothing_changes_a_config() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RuntimeConfig(Path("m")).port = 1  # type: ignore[misc]
