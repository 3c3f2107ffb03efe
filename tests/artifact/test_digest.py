"""Golden vectors: whoever changes one of these digests renames everything that was ever pushed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.artifact.digest import StreamHasher, canonical_json, is_digest, read_chunks, sha256_file, sha256_hex

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        ({"b": 1, "a": [1, 2.5, None, True]}, b'{"a":[1,2.5,null,true],"b":1}'),
        ({"z": {"y": 1, "x": 2}}, b'{"z":{"x":2,"y":1}}'),
        ("Ä €", '"Ä €"'.encode()),
        ('"\\\n\x01', b'"\\"\\\\\\n\\u0001"'),
        ([0.1, 1e-05, 1e22, 100000.0], b"[0.1,1e-05,1e+22,100000.0]"),
        ({}, b"{}"),
    ],
)
def test_canonical_json(value: object, spelling: bytes) -> None:
    assert canonical_json(value) == spelling


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1: 2}, [{True: 1}], {"a": (1, {None: 2})}])
def test_values_without_a_spelling(value: object) -> None:
    with pytest.raises(ValueError):
        canonical_json(value)


@given(st.dictionaries(st.text(alphabet=st.characters(codec="utf-8")), st.integers() | st.lists(st.booleans())))
def test_key_order_does_not_matter(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    hasher = StreamHasher()
    for piece in (b"a", b"", b"bc"):
        hasher.update(piece)
    assert sha256_hex(b"abc") == sha256_file(path) == hasher.digest == ABC
    assert hasher.size == 3


@pytest.mark.parametrize("value", ["", ABC[:-1], ABC + "0", ABC.upper(), ABC + "\n", "g" * 64, None, 1, ABC.encode()])
def test_what_is_no_digest(value: object) -> None:
    assert not is_digest(value)
    assert is_digest(ABC)


@given(st.binary(max_size=100), st.none() | st.integers(0, 120), st.integers(1, 40))
def test_read_chunks(data: bytes, limit: int | None, chunk_bytes: int) -> None:
    pieces = list(read_chunks(io.BytesIO(data), limit=limit, chunk_bytes=chunk_bytes))
    assert b"".join(pieces) == data[:limit]
    assert all(1 <= len(piece) <= chunk_bytes for piece in pieces)
