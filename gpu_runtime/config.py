"""Settings of one runtime process: from `LORARY_RUNTIME_*`, then from the command line. Read once, here, never changed after.

Every field of RuntimeConfig is one flag (`max_rank` -> `--max-rank`) and one variable (`LORARY_RUNTIME_MAX_RANK`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PREFIX = "LORARY_RUNTIME_"
DTYPES = ("float32", "bfloat16", "float16")
POLICIES = ("fcfs-unmerged", "merged", "dynamic")
MIB = 1024 * 1024


@dataclass(frozen=True)
class RuntimeConfig:
    """Raises ValueError naming the field, the value and what is allowed. Bytes are bytes; 0 means "choose for me" where said."""

    model_dir: Path
    registry_url: str | None = None
    replica_key_file: Path | None = None
    public_url: str | None = None  # where the registry reaches this process; None: http://host:port
    host: str = "127.0.0.1"
    port: int = 8100
    device: str = "cpu"
    dtype: str = "float32"  # of base weights; on a GPU of activations and KV too, where a CPU has float32
    threads: int = 0  # of the kernels; 0: all cores
    pool_bytes: int = 0  # 0: an eighth of the machine's memory, at least 64 MiB and at most 4 GiB
    poison_freed: bool = False  # fill freed pages with 0xFF: on in tests
    num_slots: int = 64  # adapters in the pool at once
    max_rank: int = 64
    host_cache_bytes: int = 512 * MIB
    disk_cache_dir: Path | None = None  # None: no disk tier
    disk_cache_bytes: int = 4096 * MIB
    num_pull_threads: int = 4
    max_batch_requests: int = 16
    max_step_tokens: int = 512
    max_model_len: int = 0  # 0: what the base model allows
    prefix_caching: bool = True  # requests of one tenant and adapter share the K and V of the tokens that they begin with
    merge_share: float = 0.5  # of the pool, the most that merged weights may take; where they need more, merged mode is off
    policy: str = "fcfs-unmerged"  # which mode steps run in
    max_wait_s: int = 10  # the longest that a request is passed over beyond first come, first served
    max_batch_adapters: int = 0  # distinct adapters in a step; 0: any number
    deadline_ms: int = 0  # for the first token, of requests that name none; 0: they wait
    max_waiting: int = 1024  # requests queued beyond the running ones before new ones are turned away
    drain_s: int = 20  # what running requests have after SIGTERM

    def __post_init__(self) -> None:
        _require(bool(str(self.model_dir)), "model_dir", self.model_dir, "the folder of a base model")
        _require(0 <= self.port <= 65535, "port", self.port, "between 0 and 65535")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        for name in ("threads", "pool_bytes", "host_cache_bytes", "disk_cache_bytes", "max_model_len", "drain_s"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("max_batch_adapters", "deadline_ms"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("num_slots", "max_rank", "num_pull_threads", "max_batch_requests", "max_step_tokens", "max_waiting", "max_wait_s"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0.0 <= self.merge_share < 1.0, "merge_share", self.merge_share, "0 (merged mode is off) or more, and below 1")
        needed = f"at least max_batch_requests, {self.max_batch_requests}: every running request decodes one token a step"
        _require(self.max_step_tokens >= self.max_batch_requests, "max_step_tokens", self.max_step_tokens, needed)

    @property
    def url(self) -> str:
        """Where this process is reached."""
        return self.public_url or f"http://{self.host}:{self.port}"

    @classmethod
    def from_environment(cls, argv: Sequence[str], *, environ: Mapping[str, str] = os.environ) -> RuntimeConfig:
        """Flags beat variables beat defaults. Raises ValueError for an unknown `LORARY_RUNTIME_*` variable or a bad value."""
        given = {**_from_variables(environ), **_from_flags(argv)}
        if "model_dir" not in given:
            raise ValueError(f"model_dir is not set: pass --model-dir or {PREFIX}MODEL_DIR, the folder of the base model to serve")
        return cls(**{name: _parse(name, text) for name, text in given.items()})


def prepare_threads(config: RuntimeConfig, *, environ: MutableMapping[str, str] = os.environ) -> None:
    """Idle threads sleep instead of spinning (DESIGN 4), at most `threads` of them; tensors lie in huge pages where the system has them
    (a sixth off the time of adapters' rows on 2 cores, whose page walks go through a hypervisor). Before torch and numba are imported."""
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if config.threads:
        environ["OMP_NUM_THREADS"] = environ["NUMBA_NUM_THREADS"] = str(config.threads)


def tracing_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's own variables name a collector, and nothing switches it off. Its SDK reads them further."""
    named = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none"
    return bool(named) and not off


def _from_variables(environ: Mapping[str, str]) -> dict[str, str]:
    given = {name.removeprefix(PREFIX).lower(): value for name, value in environ.items() if name.startswith(PREFIX)}
    unknown = sorted(given.keys() - {field.name for field in fields(RuntimeConfig)})
    if unknown:
        raise ValueError(f"{PREFIX}{unknown[0].upper()} is set, but the runtime has no such setting: correct or unset it")
    return given


def _from_flags(argv: Sequence[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(prog="python -m gpu_runtime", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in fields(RuntimeConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, metavar=str(field.type).upper())
    return vars(parser.parse_args(argv))


def _parse(name: str, text: str) -> Any:
    kind = next(str(field.type) for field in fields(RuntimeConfig) if field.name == name)
    if kind.startswith("Path"):
        return Path(text)
    if kind in ("int", "float"):
        return _parse_number(name, text, kind)
    if kind == "bool":
        _require(text.lower() in ("0", "1", "true", "false"), name, text, "0, 1, true or false")
        return text.lower() in ("1", "true")
    return text


def _parse_number(name: str, text: str, kind: str) -> float:
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}; it must be a {'whole ' if kind == 'int' else ''}number") from None


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {str(value)!r}; it must be {allowed}")
