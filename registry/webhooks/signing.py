"""Standard Webhooks signatures (standardwebhooks.com): what is signed, and the three headers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence

SECRET_PREFIX = "whsec_"  # noqa: S105 - a prefix
SECRET_BYTES = 32


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(os.urandom(SECRET_BYTES)).decode()


def headers(event_id: str, body: bytes, *, timestamp: int, secrets: Sequence[str]) -> Mapping[str, str]:
    """One `v1` signature a secret: while a secret is being replaced, either one verifies.

    signature = base64(HMAC-SHA256(secret, id.timestamp.body))
    """
    signatures = " ".join(_sign(event_id, body, timestamp=timestamp, secret=secret) for secret in secrets)
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signatures,
    }


def _sign(event_id: str, body: bytes, *, timestamp: int, secret: str) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"
