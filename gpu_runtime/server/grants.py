"""What a replica believes: grants signed by its registry, addressed to it, alive, and seen for the first time.

The replica never sees API keys and knows no tenants; a grant is its only reason to serve a request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TypeVar

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.types import Options
from pydantic import ValidationError

from registry.wire import GRANT_ALGORITHM, GRANT_ISSUER, GrantClaims, InspectionClaims

Claims = TypeVar("Claims", GrantClaims, InspectionClaims)

_UNCHECKED: Options = {"verify_exp": False, "verify_iat": False, "verify_aud": False}  # checked below, with our leeway and clock


class GrantRefused(ValueError):
    """The request must not be served. `reason` is a stable slug, the message a sentence."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class GrantVerifier:
    """Checks grants for one replica. Safe to use from any thread.

    Knows nobody until `update` (or the constructor) gives it an identity and keys, and refuses everything until then.
    `max_remembered` bounds the memory of used grants. When that many are alive at once, new ones are refused rather
    than old ones forgotten, because a forgotten grant could be used twice.
    """

    def __init__(
        self, replica_id: str = "", public_keys: Sequence[str] = (), *, leeway_s: float = 30.0, max_remembered: int = 200_000
    ) -> None:
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}  # jti -> when it may be forgotten
        self._max_remembered = max_remembered
        self.update(replica_id=replica_id, public_keys=public_keys, leeway_s=leeway_s)

    def update(self, *, replica_id: str | None = None, public_keys: Sequence[str], leeway_s: float | None = None) -> None:
        """Takes effect for the next grant. Raises ValueError if a key is not an Ed25519 public key in PEM."""
        keys = tuple(_load(pem) for pem in public_keys)
        with self._lock:
            self._keys = keys
            self._replica_id = self._replica_id if replica_id is None else replica_id
            self._leeway_s = self._leeway_s if leeway_s is None else leeway_s

    _replica_id: str = ""
    _leeway_s: float = 30.0

    def verify(self, token: str | None, *, now: float | None = None) -> GrantClaims:
        """The claims, once. `now` is Unix seconds. Raises GrantRefused."""
        return self._verify(token, GrantClaims, now=now)

    def verify_inspection(self, token: str | None, *, now: float | None = None) -> InspectionClaims:
        """The same for an inspection: neither is good for the other. Raises GrantRefused."""
        return self._verify(token, InspectionClaims, now=now)

    def _verify(self, token: str | None, kind: type[Claims], *, now: float | None) -> Claims:
        moment = time.time() if now is None else now
        if not token:
            raise GrantRefused("there is no grant; ask the registry's /v1, not a replica", reason="missing")
        with self._lock:
            keys, replica_id, leeway_s = self._keys, self._replica_id, self._leeway_s
        claims = self._read(token, kind, keys=keys)
        self._check_addressed(claims, replica_id=replica_id)
        self._check_alive(claims, now=moment, leeway_s=leeway_s)
        self._check_first_use(claims, now=moment, leeway_s=leeway_s)
        return claims

    def _read(self, token: str, kind: type[Claims], *, keys: Sequence[Ed25519PublicKey]) -> Claims:
        for key in keys:
            try:
                return kind.model_validate(jwt.decode(token, key, algorithms=[GRANT_ALGORITHM], issuer=GRANT_ISSUER, options=_UNCHECKED))
            except jwt.InvalidSignatureError:
                continue
            except (jwt.InvalidTokenError, ValidationError) as error:
                raise GrantRefused("the grant cannot be read", reason="malformed") from error
        raise GrantRefused("the grant is not signed by this replica's registry", reason="signature")

    def _check_addressed(self, claims: GrantClaims | InspectionClaims, *, replica_id: str) -> None:
        if not replica_id or claims.aud != replica_id:
            raise GrantRefused(f"the grant is addressed to replica {claims.aud}, not to {replica_id or 'this one'}", reason="audience")

    def _check_alive(self, claims: GrantClaims | InspectionClaims, *, now: float, leeway_s: float) -> None:
        if claims.exp + leeway_s < now:
            raise GrantRefused(f"the grant expired {now - claims.exp:.0f} s ago", reason="expired")
        if claims.iat - leeway_s > now:
            raise GrantRefused(
                f"the grant was issued {claims.iat - now:.0f} s in this replica's future; set its clock right", reason="future"
            )

    def _check_first_use(self, claims: GrantClaims | InspectionClaims, *, now: float, leeway_s: float) -> None:
        with self._lock:
            if claims.jti in self._used:
                raise GrantRefused("the grant has been used already", reason="replayed")
            if len(self._used) >= self._max_remembered:
                self._used = {jti: until for jti, until in self._used.items() if until >= now}
            if len(self._used) >= self._max_remembered:
                raise GrantRefused("too many grants are alive at once; try again shortly", reason="overflow")
            self._used[claims.jti] = claims.exp + leeway_s

    def check_integrity(self) -> None:
        with self._lock:
            assert len(self._used) <= self._max_remembered, "the memory of used grants has outgrown its bound"


def _load(pem: str) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("a grant public key is not PEM; the registry sends Ed25519 public keys in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"a grant public key is {type(key).__name__}; only Ed25519 is accepted")
    return key
