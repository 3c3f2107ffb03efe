"""`parse_reference`: the one reading of a model name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.adapters.service import Reference, parse_reference
from registry.errors import Invalid


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        ("pirate", Reference("pirate", alias="default")),
        ("pirate@3", Reference("pirate", number=3)),
        ("pirate@007", Reference("pirate", number=7)),
        ("pirate@prod", Reference("pirate", alias="prod")),
        ("pirate@3b", Reference("pirate", alias="3b")),
        ("a.b-c_d@e.f", Reference("a.b-c_d", alias="e.f")),
    ],
)
def test_readings(model: str, reference: Reference) -> None:
    assert parse_reference(model) == reference


@pytest.mark.parametrize(
    "model", ["", "@", "a@", "@a", "A", "a@b@c", "a/b", "a" * 64, "a@0", "a@" + "9" * 12, "a\n", "a@3\n", "ä", "a@٣", " a", "../a"]
)
def test_refusals(model: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse_reference(model)
    assert refused.value.error_code == "invalid_reference"


@given(st.text(max_size=80))
def test_anything_is_read_or_refused(model: str) -> None:
    try:
        reference = parse_reference(model)
    except Invalid:
        return
    assert (reference.number is None) != (reference.alias is None)
    assert reference.name == model.partition("@")[0]
