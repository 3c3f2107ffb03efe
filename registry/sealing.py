"""Encryption of secrets at rest: `Sealer`, keyed by LORARY_SECRET_KEY.

    v1.<key id>.<base64url(nonce 12 | AES-256-GCM ciphertext and tag)>

The key is HKDF-SHA256 of the secret key, so what signs grants and what seals secrets are never the same bytes. The
context (which row this is) is authenticated with it: a sealed text that is copied into another tenant's row does not
open. While LORARY_SECRET_KEY_PREVIOUS names the key before, texts of both open and new ones are sealed under the new.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from registry.config import Settings

FORMAT = "v1"
NONCE_BYTES = 12


class Unsealable(Exception):
    """No key of this installation opens the text: the secret key was replaced without overlap, or the row was damaged."""


class Sealer:
    """Seals under the first key, opens under any."""

    def __init__(self, secret_key: str, *, previous: Sequence[str] = ()) -> None:
        assert secret_key, "a sealer needs a secret key"
        keys = [_derive(text) for text in (secret_key, *previous)]
        self._newest = _key_id(keys[0])
        self._ciphers = {_key_id(key): AESGCM(key) for key in reversed(keys)}

    def seal(self, plaintext: str, *, context: str) -> str:
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._ciphers[self._newest].encrypt(nonce, plaintext.encode(), context.encode())
        return f"{FORMAT}.{self._newest}.{base64.urlsafe_b64encode(nonce + sealed).decode()}"

    def open(self, sealed: str, *, context: str) -> str:
        """Raises Unsealable."""
        kind, _, rest = sealed.partition(".")
        key_id, _, text = rest.partition(".")
        cipher = self._ciphers.get(key_id)
        if kind != FORMAT or cipher is None:
            raise Unsealable(f"sealed under key {key_id or '?'}, which is neither LORARY_SECRET_KEY nor LORARY_SECRET_KEY_PREVIOUS")
        try:
            raw = base64.b64decode(text, altchars=b"-_", validate=True)
            if base64.urlsafe_b64encode(raw).decode() != text:
                raise ValueError("not as we write it")
            return cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], context.encode()).decode()
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise Unsealable("damaged, or moved here from another row") from error

    def is_current(self, sealed: str) -> bool:
        """False: still sealed under a previous key."""
        return sealed.startswith(f"{FORMAT}.{self._newest}.")


def make_sealer(settings: Settings) -> Sealer:
    return Sealer(settings.secret_key.get_secret_value(), previous=[key.get_secret_value() for key in settings.secret_key_previous])


def _derive(secret_key: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"lorary/sealing/v1").derive(secret_key.encode())


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"lorary/sealing/key-id\0" + key).hexdigest()[:8]
