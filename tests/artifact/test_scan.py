"""Every value is read: the one bad number is found wherever it stands, in bounded memory."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest

from registry.artifact import scan
from registry.artifact.errors import ArtifactRefused
from registry.artifact.header import parse_header
from registry.artifact.scan import ScanReport, scan_weights
from tests.generate import decode, encode, safetensors_bytes

A_NAME, B_NAME = "x.lora_A.weight", "x.lora_B.weight"


def scan_bytes(data: bytes, **options: float) -> ScanReport:
    file = io.BytesIO(data)
    return scan_weights(file, parse_header(file, file_size=len(data)), **options)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("where", [0, 1, 499, 999])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_bad_value(monkeypatch: pytest.MonkeyPatch, dtype: str, where: int, bad: float) -> None:
    monkeypatch.setattr(scan, "CHUNK_BYTES", 64)  # so that the value may stand in any piece
    values = np.zeros(1000, np.float32)
    values[where] = bad
    with pytest.raises(ArtifactRefused) as refused:
        scan_bytes(safetensors_bytes({A_NAME: values}, dtype=dtype))
    assert refused.value.code == "not_finite"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_report_is_numpy_s(dtype: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {A_NAME: rng.normal(size=(4, 33)).astype(np.float32), B_NAME: np.zeros((7, 4), np.float32)}
    stored = decode(encode(tensors[A_NAME], dtype), dtype)
    report = scan_bytes(safetensors_bytes(tensors, dtype=dtype))
    assert report == ScanReport(num_values=160, max_abs=float(np.abs(stored).max()), zero_b=(B_NAME,), is_all_zero=True)


def test_negative_zero_is_zero_and_one_value_is_not() -> None:
    other = "y.lora_B.weight"
    tensors = {B_NAME: np.full(5, -0.0, np.float32), other: np.array([0, 1e-30], np.float32)}
    report = scan_bytes(safetensors_bytes(tensors))
    assert (report.zero_b, report.is_all_zero) == ((B_NAME,), False)


def test_bound() -> None:
    data = safetensors_bytes({A_NAME: np.array([1.0, -3.0], np.float32)})
    assert scan_bytes(data, max_abs=3.0).max_abs == 3.0
    with pytest.raises(ArtifactRefused) as refused:
        scan_bytes(data, max_abs=2.9)
    assert refused.value.code == "weight_too_large"


def test_file_that_shrank_after_its_header_was_read() -> None:
    data = safetensors_bytes({A_NAME: np.ones(100, np.float32)})
    header = parse_header(io.BytesIO(data), file_size=len(data))
    with pytest.raises(ArtifactRefused) as refused:
        scan_weights(io.BytesIO(data[:-4]), header)
    assert refused.value.code == "truncated"


def test_empty_tensors_are_fine() -> None:
    assert scan_bytes(safetensors_bytes({A_NAME: np.ones((0, 4), np.float32)})).max_abs == 0.0


def test_memory_is_bounded() -> None:
    data = safetensors_bytes({A_NAME: np.ones(16 * 2**20, np.float32)})
    file = io.BytesIO(data)  # shares the bytes
    header = parse_header(file, file_size=len(data))
    tracemalloc.start()
    scan_weights(file, header)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * scan.CHUNK_BYTES
