"""Our own reader of safetensors headers. Every bound is checked before memory is taken; only ArtifactRefused leaves.

Layout of the format: 8 bytes little-endian header length, a JSON object
{name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {string: string}}, then the data. Offsets are
relative to the data, which the tensors cover without gap or overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from registry.artifact.errors import ArtifactRefused, printable
from registry.artifact.strict_json import load_object

MAX_HEADER_BYTES = 25 * 2**20
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**48
LENGTH_BYTES = 8

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_REMEDY = "save the file again with the safetensors library"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file. [start, end) are byte offsets relative to the header's `data_start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsHeader:
    """Tensors in the order of their bytes, the file's string metadata, and where the data begins in the file."""

    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    data_start: int

    @cached_property
    def by_name(self) -> dict[str, TensorEntry]:
        return {tensor.name: tensor for tensor in self.tensors}


def parse_header(file: BinaryIO, *, file_size: int, max_header_bytes: int = MAX_HEADER_BYTES) -> SafetensorsHeader:
    """Read the header of `file`, which stands at its first byte and holds `file_size` bytes.

    Raises ArtifactRefused, and nothing else, for whatever the bytes may be.
    """
    header_bytes = _read_header_bytes(file, file_size=file_size, max_header_bytes=max_header_bytes)
    fields = load_object(header_bytes, field="header", code="bad_header")
    metadata = _metadata(fields.pop("__metadata__", {}))
    tensors = tuple(sorted((_tensor(name, value) for name, value in fields.items()), key=lambda entry: (entry.start, entry.end)))
    data_start = LENGTH_BYTES + len(header_bytes)
    _require_contiguous(tensors, data_bytes=file_size - data_start)
    return SafetensorsHeader(tensors=tensors, metadata=metadata, data_start=data_start)


def _read_header_bytes(file: BinaryIO, *, file_size: int, max_header_bytes: int) -> bytes:
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES or file_size < LENGTH_BYTES:
        raise _refuse("truncated", f"the file has {file_size} bytes, too few for a header", value=file_size)
    length = int.from_bytes(prefix, "little")
    if length > max_header_bytes and prefix.startswith((b"PK\x03\x04", b"\x80")):
        raise _refuse("pickle", "these are bytes of a pickle or a zip file, not of safetensors")
    if length > max_header_bytes:
        raise _refuse("header_too_large", f"it claims {length} bytes, at most {max_header_bytes} are read", value=length)
    if length > file_size - LENGTH_BYTES:
        raise _refuse("truncated", f"it claims {length} bytes, the file has {file_size} in all", value=length)
    header_bytes = file.read(length)
    if len(header_bytes) != length:
        raise _refuse("truncated", f"the file ends inside its header of {length} bytes", value=length)
    if not header_bytes.startswith(b"{"):
        raise _refuse("bad_header", "it does not begin with '{'")
    return header_bytes


def _refuse(code: str, problem: str, *, value: object = None) -> ArtifactRefused:
    return ArtifactRefused(code, problem, field="header", value=value, remedy=_REMEDY)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _refuse("bad_header", "__metadata__ is not an object of strings", value=type(value).__name__)
    return value


def _tensor(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad_tensor(name, "its entry is not exactly dtype, shape and data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        problem = f"tensor {printable(name)} has the dtype {printable(dtype)[:40]}, which safetensors does not define"
        raise _refuse("unknown_dtype", problem, value=dtype)
    shape = _sizes(value["shape"], name=name, what="shape", limit=MAX_DIMENSION)
    if len(shape) > MAX_DIMENSIONS:
        raise _bad_tensor(name, f"it has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    offsets = _sizes(value["data_offsets"], name=name, what="data_offsets", limit=2**63 - 1)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad_tensor(name, "its data_offsets are not a start and an end")
    entry = TensorEntry(name=name, dtype=dtype, shape=shape, start=offsets[0], end=offsets[1])
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * entry.num_bytes:
        raise _bad_tensor(name, f"{entry.num_bytes} bytes do not hold {dtype} of shape {list(shape)}")
    return entry


def _sizes(value: Any, *, name: str, what: str, limit: int) -> tuple[int, ...]:
    # `type is int` also keeps out true and 1.0, which Python would count with
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= limit for item in value):
        raise _bad_tensor(name, f"its {what} is not a list of sizes")
    return tuple(value)


def _bad_tensor(name: str, problem: str) -> ArtifactRefused:
    return _refuse("bad_tensor_entry", f"tensor {printable(name)}: {problem}", value=name)


def _require_contiguous(tensors: Iterable[TensorEntry], *, data_bytes: int) -> None:
    covered = 0
    for tensor in tensors:
        where = f"tensor {printable(tensor.name)} begins at byte {tensor.start}, the one before ends at {covered}"
        if tensor.start != covered:
            raise _refuse("offsets_gap" if tensor.start > covered else "offsets_overlap", where, value=tensor.start)
        covered = tensor.end
    if covered > data_bytes:
        raise _refuse("truncated", f"the tensors need {covered} bytes, the file has {data_bytes} after its header", value=data_bytes)
    if covered < data_bytes:
        raise _refuse("trailing_bytes", f"{data_bytes - covered} bytes follow the last tensor", value=data_bytes - covered)
