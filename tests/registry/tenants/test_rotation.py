"""Rotation: a successor with the same rights, an overlap, and no way to more than one has."""

from __future__ import annotations

import datetime as dt
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient

from registry.tenants.keys import key_id_of
from tests.registry.conftest import MakeTenant, bearer

READ = "adapters:read"


def create(client: TestClient, token: str, *scopes: str, **more: object) -> dict[str, Any]:
    reply = client.post("/api/v1/keys", json={"name": "ci", "scopes": list(scopes)} | more, headers=bearer(token))
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def rotate(client: TestClient, token: str, key_id: str, **body: object) -> Any:
    return client.post(f"/api/v1/keys/{key_id}/rotate", json=body, headers=bearer(token))


def works(client: TestClient, token: str) -> bool:
    return client.get("/api/v1/whoami", headers=bearer(token)).status_code == 200


@pytest.mark.postgresql
def test_the_successor_has_the_same_rights_and_both_work_in_the_overlap(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    old = create(client, owner, READ, "inference", adapter_prefixes=["team-"], expires_in_s=86400)
    made = rotate(client, owner, old["id"], overlap_s=3600).json()
    for name in ("name", "tenant", "scopes", "adapter_prefixes", "expires_at"):
        assert made[name] == old[name]
    assert made["predecessor_id"] == old["id"]
    assert works(client, old["token"])
    assert works(client, made["token"])
    left = dt.datetime.fromisoformat(made["predecessor_expires_at"]) - dt.datetime.fromisoformat(made["created_at"])
    assert abs(left.total_seconds() - 3600) < 60
    listed = {key["id"]: key for key in client.get("/api/v1/keys", headers=bearer(owner)).json()["items"]}
    assert listed[old["id"]]["successor_id"] == made["id"]
    assert "token" not in listed[made["id"]]


def test_without_overlap_the_old_key_stops_at_once(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    old = create(client, owner, READ)
    made = rotate(client, owner, old["id"], overlap_s=0).json()
    assert not works(client, old["token"])
    assert works(client, made["token"])


def test_a_key_may_rotate_itself(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    made = rotate(client, owner, key_id_of(owner), overlap_s=0).json()
    assert not works(client, owner)
    assert rotate(client, made["token"], made["id"]).status_code == 200


def test_an_overlap_never_prolongs_a_key(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    old = create(client, owner, READ, expires_in_s=60)
    made = rotate(client, owner, old["id"], overlap_s=3600, expires_in_s=7200).json()
    assert made["predecessor_expires_at"] == old["expires_at"]
    assert made["expires_at"] > old["expires_at"]


@pytest.mark.parametrize("overlap_s", [30 * 86_400 + 1, 10**15, -1])
def test_an_overlap_has_a_limit(client: TestClient, make_tenant: MakeTenant, overlap_s: int) -> None:
    owner = make_tenant("acme")
    old = create(client, owner, READ)
    reply = rotate(client, owner, old["id"], overlap_s=overlap_s)
    assert (reply.status_code, works(client, old["token"])) == (422, True)
    assert "overlap_s" in reply.json()["field"]


def test_what_is_over_or_was_rotated_is_not_rotated(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    old = create(client, owner, READ)
    made = rotate(client, owner, old["id"]).json()
    again = rotate(client, owner, old["id"])
    assert (again.status_code, again.json()["code"]) == (409, "key_rotated")
    assert made["id"] in again.json()["detail"]
    client.delete(f"/api/v1/keys/{made['id']}", headers=bearer(owner))
    assert rotate(client, owner, made["id"]).json()["code"] == "key_over"


def test_rotation_is_no_way_to_more(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    stranger = make_tenant("globex")
    assert rotate(client, stranger, key_id_of(owner)).status_code == 404
    narrow = create(client, owner, "keys:write", READ)["token"]
    assert rotate(client, narrow, key_id_of(owner)).status_code == 403
    limited = create(client, owner, "keys:write", READ, adapter_prefixes=["team-"])["token"]
    assert rotate(client, limited, create(client, owner, READ)["id"]).status_code == 404
    short = create(client, owner, "keys:write", READ, expires_in_s=60)["token"]
    assert rotate(client, short, create(client, owner, READ)["id"]).status_code == 403
    assert works(client, owner)


def test_rotation_is_audited_without_the_secret(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    old = create(client, owner, READ)
    made = rotate(client, owner, old["id"]).json()
    reply = client.get("/api/v1/audit", params={"action": "key.rotated"}, headers=bearer(owner))
    (event,) = reply.json()["items"]
    assert (event["resource_id"], event["before"]["expires_at"], event["after"]["successor_id"]) == (old["id"], None, made["id"])
    assert made["token"][-30:] not in client.get("/api/v1/audit", headers=bearer(owner)).text


@pytest.mark.postgresql
def test_two_rotations_at_once_make_one_successor(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    old = create(client, owner, READ)
    start, seen = threading.Barrier(3), []

    def run() -> None:
        start.wait()
        seen.append(rotate(client, owner, old["id"]).status_code)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [200, 409, 409]
