"""Resolve and pull: only with a live grant for exactly this form, at this replica, while the adapter lives."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from registry.artifact.manifest import FormManifest
from registry.serving.grants import GrantSigner
from registry.wire import GRANT_HEADER, WIRE_VERSION, GrantClaims
from tests.registry.serving.conftest import BASE_DIGEST, Pushed, World, make_replica


def grant(world: World, pushed: Pushed, replica_id: str, *, signer: GrantSigner | None = None, **changes: Any) -> str:
    now = int(time.time())
    claims = GrantClaims(
        aud=replica_id, jti="j", iat=now, exp=now + 30, tenant=pushed.tenant_id, model="m",
        version_digest=pushed.version_digest, form_digest=pushed.form_digest, max_tokens=1, key_id="k",
    )  # fmt: skip
    return (signer or world.signer).sign(claims.model_copy(update=changes))


def resolve(client: TestClient, world: World, pushed: Pushed, token: str, *, key: str = "replica", **changes: Any) -> httpx2.Response:
    body = {"wire_version": WIRE_VERSION, "tenant": pushed.tenant_id, "form_digest": pushed.form_digest, "grant": token} | changes
    return client.post("/api/v1/resolve", json=body, headers=world.bearer(key))  # type: ignore[return-value]


def pull(client: TestClient, world: World, sha256: str, token: str, *, key: str = "replica", **headers: str) -> httpx2.Response:
    return client.get(f"/api/v1/pull/{sha256}", headers=world.bearer(key) | {GRANT_HEADER: token} | headers)  # type: ignore[return-value]


def both(client: TestClient, world: World, pushed: Pushed, token: str, **options: Any) -> set[tuple[int, str]]:
    answers = [resolve(client, world, pushed, token, **options), pull(client, world, pushed.weights, token, **options)]
    return {(answer.status_code, answer.json()["code"]) for answer in answers}


def test_a_form_is_described_so_that_its_digest_can_be_recomputed_and_its_blobs_pulled(world: World, client: TestClient) -> None:
    pushed = world.push("acme", "pirate")
    token = grant(world, pushed, make_replica(client, world))
    described = resolve(client, world, pushed, token).json()
    assert FormManifest.from_json(described["manifest"]).digest == pushed.form_digest == described["form_digest"]
    assert (described["version_digest"], described["base_digest"]) == (pushed.version_digest, BASE_DIGEST)
    for blob in described["manifest"]["blobs"].values():
        answer = pull(client, world, blob["sha256"], token)
        assert hashlib.sha256(answer.content).hexdigest() == blob["sha256"]
        assert len(answer.content) == blob["size"] == int(answer.headers["content-length"])
        assert answer.headers["etag"] == f'"{blob["sha256"]}"'


def test_a_broken_pull_can_go_on_where_it_stopped(world: World, client: TestClient) -> None:
    pushed = world.push("acme", "pirate")
    token = grant(world, pushed, make_replica(client, world))
    whole = pushed.blobs[pushed.weights]
    rest = pull(client, world, pushed.weights, token, Range="bytes=1000-")
    assert (rest.status_code, rest.content) == (206, whole[1000:])
    assert rest.headers["content-range"] == f"bytes 1000-{len(whole) - 1}/{len(whole)}"
    assert pull(client, world, pushed.weights, token, Range="bytes=5-9").content == whole[5:10]


def test_grants_of_others_open_nothing(world: World, client: TestClient) -> None:
    pushed, other = world.push("acme", "pirate"), world.push("rival", "theirs")
    replica_id = make_replica(client, world)
    world.add_key("second", tenant=None, scopes=["replica"])
    elsewhere = make_replica(client, world, url="http://else:1", key="second")
    refused = {(403, "grant_refused")}
    past = int(time.time()) - 100
    assert both(client, world, pushed, "no grant") == refused
    assert both(client, world, pushed, grant(world, pushed, replica_id, signer=GrantSigner("another"))) == refused
    assert both(client, world, pushed, grant(world, pushed, replica_id, iat=past, exp=past + 30)) == refused
    assert both(client, world, pushed, grant(world, pushed, elsewhere)) == refused
    assert both(client, world, pushed, grant(world, pushed, replica_id), key="second") == refused
    assert both(client, world, pushed, grant(world, pushed, "0" * 32)) == refused
    assert both(client, world, pushed, grant(world, pushed, replica_id, form_digest=None, version_digest=None)) == refused
    mine = grant(world, pushed, replica_id)
    assert resolve(client, world, other, mine).json()["code"] == "grant_refused"
    assert resolve(client, world, pushed, mine, tenant=other.tenant_id).json()["code"] == "grant_refused"
    assert resolve(client, world, pushed, mine, form_digest="a" * 64).json()["code"] == "grant_refused"
    assert pull(client, world, other.weights, mine).status_code == 404
    assert pull(client, world, "a" * 64, mine).status_code == 404
    assert client.get(f"/api/v1/pull/{pushed.weights}", headers=world.bearer("replica")).status_code == 422
    assert both(client, world, pushed, mine, key="admin") == both(client, world, pushed, mine, key="acme") == {(403, "forbidden")}


@pytest.mark.parametrize(
    "undo",
    [
        "UPDATE adapters SET deleted_at = '2026-01-01 00:00:00.000000'",
        "UPDATE adapter_versions SET status = 'deleted'",
        "UPDATE adapter_versions SET status = 'pending'",
        "UPDATE tenants SET deleted_at = '2026-01-01 00:00:00.000000' WHERE name = 'acme'",
    ],
)
def test_what_is_gone_cannot_be_pulled_by_a_grant_from_before(world: World, client: TestClient, undo: str) -> None:
    pushed = world.push("acme", "pirate")
    token = grant(world, pushed, make_replica(client, world))
    assert resolve(client, world, pushed, token).status_code == 200
    world.execute(undo)
    assert both(client, world, pushed, token) == {(404, "form_gone")}


def test_a_revoked_replica_key_pulls_nothing(world: World, client: TestClient) -> None:
    pushed = world.push("acme", "pirate")
    token = grant(world, pushed, make_replica(client, world))
    world.execute("UPDATE api_keys SET revoked_at = '2026-01-01 00:00:00.000000' WHERE name = 'replica'")
    assert resolve(client, world, pushed, token).status_code == pull(client, world, pushed.weights, token).status_code == 401
