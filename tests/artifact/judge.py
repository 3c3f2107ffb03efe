"""The whole gate over files in memory: what push and job do one after the other."""

from __future__ import annotations

import io
from typing import Any

from registry.artifact.base import BaseSpec
from registry.artifact.gate import Accepted, GateLimits, check_push
from registry.artifact.scan import ScanReport, scan_weights
from tests.artifact.cases import MAX_RANK
from tests.generate import BASE_NAME, TINY_CONFIG


def judge(files: dict[str, bytes], *, base_config: dict[str, Any] = TINY_CONFIG, weights_bytes: int = 2**30) -> tuple[Accepted, ScanReport]:
    """Raises ArtifactRefused."""
    weights = files.get("adapter_model.safetensors", b"")
    file = io.BytesIO(weights)
    accepted = check_push(
        {path: len(data) for path, data in files.items()},
        config=files.get("adapter_config.json", b""),
        weights=file,
        weights_size=len(weights),
        base=BaseSpec.from_config(base_config),
        base_names=[BASE_NAME],
        max_rank=MAX_RANK,
        limits=GateLimits(weights_bytes=weights_bytes),
    )
    return accepted, scan_weights(file, accepted.header)
