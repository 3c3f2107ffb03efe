"""What a replica is doing right now, asked of the replica itself for an operator: one signed inspection, one relayed answer."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import httpx2
from fastapi.concurrency import run_in_threadpool

from registry.errors import NotFound, Unavailable
from registry.serving import repository
from registry.serving.front_door import FrontDoor
from registry.serving.proxy import RETRY_AFTER_S
from registry.serving.repository import Address
from registry.wire import GRANT_HEADER, STATE_PATH, InspectionClaims

TTL_S = 10
TIMEOUT_S = 10.0
MAX_BYTES = 16 << 20  # a replica is a stranger as far as sizes go


async def state_of(door: FrontDoor, replica_id: str) -> dict[str, Any]:
    """The replica's `/debug/state`. Raises NotFound, and Unavailable where the replica does not answer or answers no JSON object."""
    address = await run_in_threadpool(_find, door, replica_id)
    try:
        body = await _ask(door, address)
        found = json.loads(body, parse_constant=_no_number)
    except (httpx2.TransportError, ValueError, RecursionError) as error:
        raise _silent(replica_id, f"{type(error).__name__}") from error
    if not isinstance(found, dict):
        raise _silent(replica_id, "the answer is no object")
    return found


def _find(door: FrontDoor, replica_id: str) -> Address:
    with door.database.read() as session:
        address = repository.find_address(session, replica_id)
    if address is None:
        raise NotFound(f"no replica {replica_id[:64]!r}", field="replica_id", value=replica_id[:64], remedy="see `GET /api/v1/replicas`")
    return address


async def _ask(door: FrontDoor, address: Address) -> bytes:
    now = int(time.time())
    token = door.signer.sign(InspectionClaims(aud=address.replica_id, jti=uuid.uuid4().hex, iat=now, exp=now + TTL_S))
    request = door.client.build_request(
        "GET", address.url + STATE_PATH, headers={GRANT_HEADER: token, "accept-encoding": "identity"}, timeout=TIMEOUT_S
    )
    upstream = await door.client.send(request, stream=True)
    try:
        if upstream.status_code != 200:
            raise _silent(address.replica_id, f"it answered {upstream.status_code}")
        body = bytearray()
        async for chunk in upstream.aiter_raw():
            body += chunk
            if len(body) > MAX_BYTES:
                raise _silent(address.replica_id, f"its answer is larger than {MAX_BYTES} bytes")
        return bytes(body)
    finally:
        await upstream.aclose()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _silent(replica_id: str, reason: str) -> Unavailable:
    return Unavailable(
        f"replica {replica_id} did not say what it does: {reason}",
        code="replica_silent",
        retry_after_s=RETRY_AFTER_S,
        remedy="see whether it is live in `GET /api/v1/replicas`, and its log",
    )
