"""The shape of API keys: checksum, randomness, hashing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.tenants.keys import KeyHasher, key_id_of, new_key

SECRET_KEY = "k" * 40


def test_new_key_has_the_documented_shape() -> None:
    key = new_key()
    assert re.fullmatch(r"lry_[0-9A-Za-z]{12}_[0-9A-Za-z]{38}", key.token)
    assert key_id_of(key.token) == key.key_id


def test_checksum_is_crc32_in_base62() -> None:
    """A golden key: the format is public, for secret scanners."""
    assert key_id_of("lry_AAAAAAAAAAAA_" + "B" * 32 + "1kNYjz") == "AAAAAAAAAAAA"


@given(position=st.integers(0, 54), replacement=st.sampled_from("0aZ_-é "))
def test_one_changed_character_is_noticed_offline(position: int, replacement: str) -> None:
    token = new_key().token
    changed = token[:position] + replacement + token[position + 1 :]
    if changed == token:
        return
    with pytest.raises(ValueError, match=r"checksum|shaped"):
        key_id_of(changed)


@given(st.text(max_size=80))
def test_any_text_is_refused_with_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"checksum|shaped"):
        key_id_of(text)


@pytest.mark.parametrize("edit", [lambda t: t + "x", lambda t: t[:-1], lambda t: t + "\n", lambda t: " " + t, str.upper])
def test_near_misses_are_refused(edit) -> None:
    with pytest.raises(ValueError, match=r"checksum|shaped"):
        key_id_of(edit(new_key().token))


def test_hash_depends_on_the_secret_key_and_on_every_character() -> None:
    token = new_key().token
    one, other = KeyHasher(SECRET_KEY), KeyHasher("j" * 40)
    assert one.digest(token) != other.digest(token)
    assert one.matches(token, one.digest(token))
    assert not other.matches(token, one.digest(token))
    assert not one.matches(new_key().token, one.digest(token))
    assert not one.matches(token, None)


def test_short_secret_key_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="lorary db init"):
        KeyHasher("short")
