"""The shape of an API key, and how it is stored: no database, no HTTP.

    lry_<id>_<secret><crc>      id 12, secret 32 (190 bits), crc 6 characters, all base62

The checksum is CRC-32 over everything before it, so that a mistyped key is refused without a query and a secret
scanner can tell a key from noise. Stored is HMAC-SHA256(LORARY_SECRET_KEY, key): a stolen table opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from registry.config import Settings

PREFIX = "lry"
ID_LENGTH = 12
SECRET_LENGTH = 32
CHECKSUM_LENGTH = 6
MIN_SECRET_KEY_LENGTH = 32

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_TOKEN = re.compile(
    rf"(?P<body>{PREFIX}_(?P<key_id>[0-9A-Za-z]{{{ID_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH}}})(?P<crc>[0-9A-Za-z]{{{CHECKSUM_LENGTH}}})"
)

ADMIN = "admin"
REPLICA = "replica"
TENANT_SCOPES = frozenset(
    {"adapters:read", "adapters:write", "aliases:write", "inference", "jobs:read", "jobs:write", "keys:write"}
    | {"audit:read", "secrets:write", "signing:write", "usage:read", "webhooks:write"}
)
PLATFORM_SCOPES = frozenset({ADMIN, REPLICA})  # of keys that belong to no tenant
SCOPES = TENANT_SCOPES | PLATFORM_SCOPES


@dataclass(frozen=True)
class NewKey:
    """A key at the one moment when its token is known."""

    key_id: str
    token: str


def new_key() -> NewKey:
    key_id, secret = _random(ID_LENGTH), _random(SECRET_LENGTH)
    body = f"{PREFIX}_{key_id}_{secret}"
    return NewKey(key_id=key_id, token=body + _checksum(body))


def given_key(token: str) -> NewKey:
    """A key that was made elsewhere by `new_key`. Raises ValueError as `key_id_of`."""
    return NewKey(key_id=key_id_of(token), token=token)


def key_id_of(token: str) -> str:
    """The id inside a well-formed token. Raises ValueError when the shape or the checksum is wrong."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ValueError("not shaped like an API key of this registry (lry_<id>_<secret>)")
    if not hmac.compare_digest(_checksum(match["body"]), match["crc"]):
        raise ValueError("its checksum is wrong: some characters were lost or mistyped")
    return match["key_id"]


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_BASE62))
        digits = _BASE62[digit] + digits
    return digits


class KeyHasher:
    """HMAC of tokens under the installation's secret key, and its comparison in constant time.

    Tokens that were hashed under a previous secret key still match, until that key is dropped from the settings.
    """

    def __init__(self, secret_key: str, *, previous: Sequence[str] = ()) -> None:
        if len(secret_key) < MIN_SECRET_KEY_LENGTH:
            raise ValueError(
                f"LORARY_SECRET_KEY has {len(secret_key)} characters; it must have at least {MIN_SECRET_KEY_LENGTH}: "
                "run `lorary db init`, which writes one into the state directory"
            )
        self._keys = [hashlib.sha256(b"lorary/api-keys/v1\0" + text.encode()).digest() for text in (secret_key, *previous)]

    def digest(self, token: str) -> str:
        return self._digests(token)[0]

    def _digests(self, token: str) -> list[str]:
        return [hmac.new(key, token.encode(), hashlib.sha256).hexdigest() for key in self._keys]

    def matches(self, token: str, stored: str | None) -> bool:
        """False for `stored` None too, after the same work: an unknown id takes as long as a wrong secret."""
        matches = [hmac.compare_digest(digest, stored or "0" * 64) for digest in self._digests(token)]
        return any(matches) and stored is not None


def make_key_hasher(settings: Settings) -> KeyHasher:
    """Raises ValueError when there is no secret key, or one that is too short."""
    return KeyHasher(settings.secret_key.get_secret_value(), previous=[key.get_secret_value() for key in settings.secret_key_previous])
