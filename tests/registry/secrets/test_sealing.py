"""Sealing: what opens, what does not, and how keys are replaced."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from registry.config import Settings
from registry.sealing import Sealer, Unsealable, make_sealer
from registry.tenants.keys import KeyHasher, new_key

OLD, NEW, OTHER = "old-" * 10, "new-" * 10, "other-" * 10


def test_what_was_sealed_opens_where_it_belongs_and_nowhere_else() -> None:
    sealer = Sealer(NEW)
    sealed = sealer.seal("hunter2 ü", context="a/1")
    assert "hunter2" not in sealed
    assert sealer.open(sealed, context="a/1") == "hunter2 ü"
    with pytest.raises(Unsealable, match="another row"):
        sealer.open(sealed, context="b/1")
    assert sealer.seal("hunter2 ü", context="a/1") != sealed, "equal secrets do not look equal"


def test_every_changed_byte_is_noticed() -> None:
    sealer = Sealer(NEW)
    sealed = sealer.seal("x", context="c")
    for position in range(len(sealed)):
        changed = sealed[:position] + ("A" if sealed[position] != "A" else "B") + sealed[position + 1 :]
        with pytest.raises(Unsealable):
            sealer.open(changed, context="c")


@pytest.mark.parametrize("text", ["", "v1", "v1.", "v1.abc", "v1..", "v2.00000000.AAAA", "plain text", "v1.00000000.é"])
def test_nonsense_does_not_open(text: str) -> None:
    with pytest.raises(Unsealable):
        Sealer(NEW).open(text, context="c")


def test_a_key_is_replaced_with_overlap() -> None:
    sealed = Sealer(OLD).seal("x", context="c")
    both = Sealer(NEW, previous=[OLD])
    assert both.open(sealed, context="c") == "x"
    assert not both.is_current(sealed)
    again = both.seal(both.open(sealed, context="c"), context="c")
    assert both.is_current(again)
    assert Sealer(NEW).open(again, context="c") == "x"
    with pytest.raises(Unsealable, match="LORARY_SECRET_KEY_PREVIOUS"):
        Sealer(NEW).open(sealed, context="c")


def test_settings_name_several_previous_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_SECRET_KEY_PREVIOUS", f"{OLD}, {OTHER}")
    settings = Settings(secret_key=SecretStr(NEW))
    assert OLD not in repr(settings)
    assert make_sealer(settings).open(Sealer(OTHER).seal("x", context="c"), context="c") == "x"


def test_api_keys_outlive_a_replaced_secret_key_too() -> None:
    token = new_key().token
    stored = KeyHasher(OLD).digest(token)
    assert KeyHasher(NEW, previous=[OLD]).matches(token, stored)
    assert KeyHasher(NEW, previous=[OLD]).digest(token) == KeyHasher(NEW).digest(token)
    assert not KeyHasher(NEW).matches(token, stored)
    assert not KeyHasher(NEW, previous=[OLD]).matches(token, None)
