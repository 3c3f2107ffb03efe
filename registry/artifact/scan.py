"""The gate's second half: every weight is finite and within bounds. One pass, bounded memory, numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from registry.artifact.digest import read_chunks
from registry.artifact.errors import ArtifactRefused, printable
from registry.artifact.header import SafetensorsHeader, TensorEntry

MAX_ABS = 65504.0  # the largest float16: nothing that trained is near it, and half precision overflows past it
CHUNK_BYTES = 4 * 2**20

# dtype -> (unsigned integer of that width, bits of infinity); for all three, magnitudes order like their bits
_FORMATS: dict[str, tuple[str, int]] = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


@dataclass(frozen=True)
class ScanReport:
    """`zero_b`: names of the B matrices that hold zeros alone, so their target is as in the base model."""

    num_values: int
    max_abs: float
    zero_b: tuple[str, ...]
    is_all_zero: bool  # every B is zero: the adapter changes nothing


def scan_weights(file: BinaryIO, header: SafetensorsHeader, *, max_abs: float = MAX_ABS) -> ScanReport:
    """Read every value once. `file` is at any place and may be a whole adapter_model.safetensors.

    Raises ArtifactRefused for NaN, infinity, a magnitude above `max_abs`, or a file that ends early.
    """
    file.seek(header.data_start)
    largest = {tensor.name: _largest(file, tensor, max_abs=max_abs) for tensor in header.tensors}
    b_names = [name for name in largest if ".lora_B." in name]
    zero_b = tuple(name for name in b_names if largest[name] == 0.0)
    return ScanReport(
        num_values=sum(tensor.num_elements for tensor in header.tensors),
        max_abs=max(largest.values(), default=0.0),
        zero_b=zero_b,
        is_all_zero=len(zero_b) == len(b_names),
    )


def _largest(file: BinaryIO, tensor: TensorEntry, *, max_abs: float) -> float:
    """Largest magnitude in one tensor; `file` stands at its first byte."""
    if tensor.dtype not in _FORMATS:
        raise _refuse("unsupported_dtype", f"{printable(tensor.name)} is stored as {tensor.dtype}", tensor, value=tensor.dtype)
    integer, infinity = _FORMATS[tensor.dtype]
    bits, left = 0, tensor.num_bytes
    while left:
        chunk = b"".join(read_chunks(file, limit=min(left, CHUNK_BYTES)))
        if len(chunk) != min(left, CHUNK_BYTES):
            raise _refuse("truncated", f"the file ends inside {printable(tensor.name)}", tensor)
        left -= len(chunk)
        values = np.frombuffer(chunk, dtype=integer)
        bits = max(bits, int((values & (np.iinfo(values.dtype).max >> 1)).max()))
    if bits >= infinity:
        raise _refuse("not_finite", f"{printable(tensor.name)} holds NaN or infinity", tensor)
    magnitude = _as_float(bits, tensor.dtype)
    if magnitude > max_abs:
        problem = f"{printable(tensor.name)} holds a magnitude of {magnitude:.6g}, at most {max_abs:g} is taken"
        raise _refuse("weight_too_large", problem, tensor, value=magnitude)
    return magnitude


def _as_float(bits: int, dtype: str) -> float:
    if dtype == "F16":
        return float(np.array(bits, dtype=np.uint16).view(np.float16))
    single = bits << 16 if dtype == "BF16" else bits
    value: npt.NDArray[Any] = np.array(single, dtype=np.uint32).view(np.float32)
    return float(value)


def _refuse(code: str, problem: str, tensor: TensorEntry, *, value: object = None) -> ArtifactRefused:
    remedy = "check the training run and save the adapter again"
    return ArtifactRefused(code, problem, field="weights", value=value if value is not None else tensor.name, remedy=remedy)
