"""The state of a replica, relayed to admins: who may, what is asked of the replica, and what its silence becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest
from starlette.testclient import TestClient

from registry.cli.top import Look, line_of
from registry.wire import GRANT_ALGORITHM, GRANT_HEADER, STATE_PATH, InspectionClaims
from tests.registry.serving.conftest import World, registration, serving


@dataclass
class Told:
    """A replica that answers its state with `body`, and keeps what it was asked with."""

    status: int = 200
    body: bytes = b'{"pool": {}}'
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        assert "authorization" not in headers
        self.asked.append((scope["path"], headers[GRANT_HEADER.lower()]))
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": self.body})


@pytest.fixture
def told() -> Iterator[tuple[Told, str]]:
    replica = Told()
    with serving(replica) as url:
        yield replica, url


def register(client: TestClient, world: World, url: str) -> str:
    welcome = client.post("/api/v1/replicas", json=registration(url), headers=world.bearer("replica"))
    return str(welcome.json()["replica_id"])


def test_an_admin_reads_it_by_an_inspection_for_that_replica(world: World, client: TestClient, told: tuple[Told, str]) -> None:
    replica, url = told
    replica_id = register(client, world, url)
    for _ in range(2):
        answer = client.get(f"/api/v1/replicas/{replica_id}/state", headers=world.bearer("admin"))
        assert (answer.status_code, answer.json()) == (200, {"pool": {}})
    seen = [
        InspectionClaims.model_validate(
            jwt.decode(token, world.signer.public_keys[0], algorithms=[GRANT_ALGORITHM], options={"verify_aud": False})
        )
        for _path, token in replica.asked
    ]
    assert {path for path, _token in replica.asked} == {STATE_PATH}
    assert {claims.aud for claims in seen} == {replica_id}
    assert len({claims.jti for claims in seen}) == 2
    assert all(claims.exp - claims.iat <= 10 for claims in seen)


@pytest.mark.parametrize(
    "answer", [(500, b"{}"), (401, b"{}"), (200, b"[]"), (200, b"{"), (200, b'{"a": NaN}'), (200, b"[" * 100_000), (200, b" " * (17 << 20))]
)
def test_what_a_replica_cannot_say_is_a_problem(
    world: World, client: TestClient, told: tuple[Told, str], answer: tuple[int, bytes]
) -> None:
    replica, url = told
    replica.status, replica.body = answer
    refused = client.get(f"/api/v1/replicas/{register(client, world, url)}/state", headers=world.bearer("admin"))
    assert (refused.status_code, refused.json()["code"]) == (503, "replica_silent")


def test_one_that_is_gone_and_one_that_never_was(world: World, client: TestClient) -> None:
    gone = register(client, world, "http://127.0.0.1:9")
    assert client.get(f"/api/v1/replicas/{gone}/state", headers=world.bearer("admin")).json()["code"] == "replica_silent"
    missing = client.get("/api/v1/replicas/nothing/state", headers=world.bearer("admin"))
    assert (missing.status_code, missing.json()["field"]) == (404, "replica_id")
    assert client.get(f"/api/v1/replicas/{gone}/state", headers=world.bearer("replica")).status_code == 403


def test_top_works_out_rates_between_two_looks() -> None:
    state: dict[str, Any] = {
        "counts": {"generated_tokens": 100},
        "first_token": {"requests": 4.0, "seconds": 2.0},
        "running": {"total": 1},
        "waiting": {"total": 2},
        "adapters": {"pool": 1, "host": 2, "disk": 3},
        "merged": {"adapter": None},
        "pool": {"num_pages": 10, "pages": {"free": 4, "kv": 6}},
    }
    later = json.loads(json.dumps(state)) | {"counts": {"generated_tokens": 150}, "first_token": {"requests": 6.0, "seconds": 2.5}}
    replica = {"id": "r", "base_model": "m"}
    line = line_of(Look(replica, later, 12.0), before=Look(replica, state, 10.0))
    assert (line["tokens_per_s"], line["ttft_s"], line["used_percent"], line["mode"]) == (25.0, 0.25, 60.0, "unmerged")
    alone = line_of(Look(replica, state, 1.0), before=None)
    assert (alone["tokens_per_s"], alone["ttft_s"]) == (None, 0.5)
    anew = line_of(Look(replica, state, 13.0), before=Look(replica, later, 12.0))
    assert (anew["tokens_per_s"], anew["ttft_s"]) == (None, 0.5)
    silent = line_of(Look(replica, None, 1.0), before=None)
    assert (silent["answers"], silent["tokens_per_s"]) == (False, None)
