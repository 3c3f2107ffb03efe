"""The header parser under random and mutated bytes; a valid parse equals the safetensors library's."""

from __future__ import annotations

import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.artifact.errors import ArtifactRefused
from registry.artifact.header import DTYPE_BITS, SafetensorsHeader, parse_header
from tests.generate import generate_adapter, safetensors_bytes, tiny_base, with_header

safetensors = pytest.importorskip("safetensors")

VALID = generate_adapter(tiny_base(), rank=1, layers=[0], targets=("q_proj",)).weights_bytes


def parse(data: bytes) -> SafetensorsHeader:
    return parse_header(io.BytesIO(data), file_size=len(data))


def parse_or_none(data: bytes) -> SafetensorsHeader | None:
    """None where it is refused; every other exception fails the test."""
    try:
        return parse(data)
    except ArtifactRefused:
        return None


def assert_as_the_library_says(data: bytes, header: SafetensorsHeader) -> None:
    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == header.by_name.keys()
    for tensor in header.tensors:
        begin = header.data_start + tensor.start
        assert theirs[tensor.name]["dtype"] == tensor.dtype
        assert tuple(theirs[tensor.name]["shape"]) == tensor.shape
        assert bytes(theirs[tensor.name]["data"]) == data[begin : begin + tensor.num_bytes]


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    assert parse_or_none(data) is None or len(data) >= 10


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_random_headers(header: bytes, data: bytes) -> None:
    parse_or_none(with_header(b"{" + header, data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
sizes = st.lists(st.integers(-1, 9) | st.integers(), max_size=3) | json_values
entries = st.fixed_dictionaries({"dtype": st.sampled_from([*DTYPE_BITS, "F31"]) | json_values, "shape": sizes, "data_offsets": sizes})


@given(st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), entries | json_values, max_size=4), st.binary(max_size=64))
def test_headers_that_are_json(header: dict[str, object], data: bytes) -> None:
    file = with_header(json.dumps(header).encode(), data)
    parsed = parse_or_none(file)
    if parsed is not None:
        assert sum(tensor.num_bytes for tensor in parsed.tensors) == len(data)


@given(st.data())
def test_mutations_of_a_valid_file(data: st.DataObject) -> None:
    """Bytes overwritten, cut out, put in: refused, or read exactly as the library reads it."""
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(mutated), 400)))
        put = data.draw(st.binary(max_size=3) | st.sampled_from([b"9", b'"', b"[", b"}", b"-", b"0", b"1e9"]))
        mutated[at : at + data.draw(st.integers(0, 3))] = put
    parsed = parse_or_none(bytes(mutated))
    if parsed is not None:
        assert_as_the_library_says(bytes(mutated), parsed)


@given(
    st.dictionaries(st.text(min_size=1, max_size=12), st.lists(st.integers(0, 4), max_size=3), max_size=5),
    st.sampled_from(["F32", "F16", "BF16"]),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_valid_files_are_read_as_the_library_reads_them(shapes: dict[str, list[int]], dtype: str, metadata: dict[str, str]) -> None:
    shapes.pop("__metadata__", None)
    file = safetensors_bytes({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, dtype=dtype, metadata=metadata)
    header = parse(file)
    assert header.metadata == metadata
    assert_as_the_library_says(file, header)


def test_every_dtype_of_the_library_is_known() -> None:
    for dtype, bits in DTYPE_BITS.items():
        header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}).encode()
        file = with_header(header, bytes(bits))
        assert_as_the_library_says(file, parse(file))


def test_padding_after_the_header_is_part_of_it() -> None:
    file = with_header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}    ', b"x")
    assert_as_the_library_says(file, parse(file))


@pytest.mark.parametrize("claimed", [2**24, 2**40, 2**63, 2**64 - 1])
def test_a_claimed_length_takes_no_memory(claimed: int) -> None:
    file = claimed.to_bytes(8, "little") + b"{}"
    tracemalloc.start()
    with pytest.raises(ArtifactRefused):
        parse(file)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_file_that_is_shorter_than_it_was_said_to_be() -> None:
    with pytest.raises(ArtifactRefused, match="ends inside its header"):
        parse_header(io.BytesIO(VALID[:50]), file_size=len(VALID))
