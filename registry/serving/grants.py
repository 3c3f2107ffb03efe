"""Grants: signed, short-lived permissions of one request to one replica (EdDSA, Ed25519).

The signing key is derived from LORARY_SECRET_KEY, so that every registry process of one installation signs alike
and nothing more has to be stored. Replicas learn only the public half, at registration and with each heartbeat.
"""

from __future__ import annotations

import time
from functools import lru_cache

import jwt
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jwt.types import Options
from pydantic import ValidationError

from registry.errors import Forbidden
from registry.wire import GRANT_ALGORITHM, GRANT_ISSUER, GrantClaims, InspectionClaims

_UNCHECKED: Options = {"verify_exp": False, "verify_iat": False, "verify_aud": False}  # `read` checks expiry; any replica may ask
_PURPOSE = b"lorary grant signing key v1"


class GrantSigner:
    """Signs grants, and reads back its own when a replica resolves or pulls with one."""

    def __init__(self, secret: str) -> None:
        if not secret:
            raise ValueError("LORARY_SECRET_KEY is empty, so grants cannot be signed; run `lorary db init` or set it")
        seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_PURPOSE).derive(secret.encode())
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self._public = self._private.public_key()
        pem = self._public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.public_keys: tuple[str, ...] = (pem.decode(),)

    def sign(self, claims: GrantClaims | InspectionClaims) -> str:
        return jwt.encode(claims.model_dump(exclude_none=True), self._private, algorithm=GRANT_ALGORITHM)

    def read(self, token: str, *, leeway_s: float, now: float | None = None) -> GrantClaims:
        """The claims of a live grant of ours. Raises Forbidden `grant_refused` for any other token."""
        try:
            decoded = jwt.decode(token, self._public, algorithms=[GRANT_ALGORITHM], issuer=GRANT_ISSUER, options=_UNCHECKED)
            claims = GrantClaims.model_validate(decoded)
        except (jwt.InvalidTokenError, ValidationError) as error:
            raise _refused("it is not signed by this registry") from error
        if claims.exp + leeway_s < (time.time() if now is None else now):
            raise _refused("it has expired")
        return claims


def _refused(reason: str) -> Forbidden:
    return Forbidden(
        f"the grant is refused: {reason}",
        code="grant_refused",
        field="grant",
        remedy="use the grant of the request that needs the adapter, while it is live",
    )


@lru_cache(maxsize=4)
def signer_for(secret: str) -> GrantSigner:
    """One signer a secret and process; deriving the key costs more than signing."""
    return GrantSigner(secret)
