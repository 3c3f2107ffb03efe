"""Tenants and keys over HTTP: names, rights, escalation, listings."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from registry.tenants.keys import key_id_of
from registry.tenants.service import RESERVED_NAMES
from tests.registry.conftest import MakeKey, MakeTenant, bearer

pytestmark = pytest.mark.postgresql


def test_tenant_life(client: TestClient, admin_token: str) -> None:
    made = client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token))
    assert made.status_code == 201
    assert client.get("/api/v1/tenants/acme", headers=bearer(admin_token)).json() == made.json()
    assert client.delete("/api/v1/tenants/acme", headers=bearer(admin_token)).status_code == 204
    assert client.get("/api/v1/tenants/acme", headers=bearer(admin_token)).status_code == 404
    assert client.get("/api/v1/tenants", headers=bearer(admin_token)).json()["items"] == []
    assert client.delete("/api/v1/tenants/acme", headers=bearer(admin_token)).status_code == 404


def test_names_are_taken_once_even_after_deletion(client: TestClient, admin_token: str) -> None:
    for status in (201, 409):
        assert client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token)).status_code == status
    client.delete("/api/v1/tenants/acme", headers=bearer(admin_token))
    reply = client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token))
    assert (reply.status_code, reply.json()["code"]) == (409, "conflict")


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "", "A", "-a", "a b", "a/b", "../a", "a" * 64, "é", "a\n"])
def test_bad_names_are_refused(client: TestClient, admin_token: str, name: str) -> None:
    reply = client.post("/api/v1/tenants", json={"name": name}, headers=bearer(admin_token))
    assert reply.status_code == 422
    assert "name" in reply.json()["field"]


@pytest.mark.parametrize("name", ["a", "0", "acme-1.x_y", "a" * 63])
def test_good_names(client: TestClient, admin_token: str, name: str) -> None:
    assert client.post("/api/v1/tenants", json={"name": name}, headers=bearer(admin_token)).status_code == 201


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/tenants"), ("GET", "/tenants"), ("GET", "/tenants/acme"), ("DELETE", "/tenants/acme")]
)
def test_only_admins_see_tenants(client: TestClient, make_tenant: MakeTenant, method: str, path: str) -> None:
    token = make_tenant("acme")
    reply = client.request(method, f"/api/v1{path}", headers=bearer(token), json={"name": "new"} if method == "POST" else None)
    assert (reply.status_code, reply.json()["value"]) == (403, "admin")


def test_tenant_listing_pages_through_everything_once(client: TestClient, admin_token: str) -> None:
    names = {f"tenant-{number}" for number in range(7)}
    for name in names:
        client.post("/api/v1/tenants", json={"name": name}, headers=bearer(admin_token))
    seen, cursor = [], None
    while True:
        params = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = client.get("/api/v1/tenants", params=params, headers=bearer(admin_token)).json()
        seen += [item["name"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(seen) == 7
    assert set(seen) == names


def _create(client: TestClient, token: str, *scopes: str, tenant: str | None = None, **more: object):
    return client.post("/api/v1/keys", json={"name": "k", "scopes": list(scopes)} | more, headers=bearer(token, tenant))


def test_key_is_shown_once_and_works(client: TestClient, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    made = _create(client, owner, "adapters:read", "adapters:read", "inference", expires_in_s=60).json()
    assert (made["tenant"], made["scopes"]) == ("acme", ["adapters:read", "inference"])
    assert made["created_by"] == key_id_of(owner)
    told = client.get("/api/v1/whoami", headers=bearer(made["token"])).json()
    same = ("tenant", "scopes", "expires_at", "adapter_prefixes")
    assert told == {"key_id": made["id"]} | {name: made[name] for name in same}
    listing = client.get("/api/v1/keys", headers=bearer(owner))
    assert made["token"] not in listing.text
    assert {item["id"] for item in listing.json()["items"]} == {made["id"], key_id_of(owner)}


def test_a_key_cannot_grant_what_it_lacks(client: TestClient, make_tenant: MakeTenant) -> None:
    limited = make_tenant("acme", "keys:write", "adapters:read")
    assert _create(client, limited, "adapters:read").status_code == 201
    reply = _create(client, limited, "adapters:read", "inference")
    assert (reply.status_code, reply.json()["value"]) == (403, "inference")
    assert _create(client, make_tenant("globex", "adapters:read"), "adapters:read").status_code == 403


@pytest.mark.parametrize("scope", ["admin", "replica"])
def test_platform_scopes_are_not_for_tenants(client: TestClient, admin_token: str, make_tenant: MakeTenant, scope: str) -> None:
    token = make_tenant("acme")
    assert _create(client, token, scope).status_code == 422
    assert _create(client, admin_token, scope, tenant="acme").status_code == 422
    made = _create(client, admin_token, scope)
    assert (made.status_code, made.json()["tenant"]) == (201, None)


def test_tenant_scopes_need_a_tenant(client: TestClient, admin_token: str, make_tenant: MakeTenant) -> None:
    make_tenant("acme")
    reply = _create(client, admin_token, "adapters:read")
    assert (reply.status_code, reply.json()["field"]) == (422, "scopes")
    assert "X-Lorary-Tenant" in reply.json()["remedy"]
    assert _create(client, admin_token, "adapters:read", tenant="acme").json()["tenant"] == "acme"


def test_replica_key_can_make_no_keys(client: TestClient, replica_token: str) -> None:
    assert _create(client, replica_token, "replica").status_code == 403


def test_a_key_cannot_make_one_that_outlives_it(client: TestClient, make_tenant: MakeTenant) -> None:
    short = _create(client, make_tenant("acme"), "keys:write", "inference", expires_in_s=100).json()["token"]
    assert _create(client, short, "inference").status_code == 403
    assert _create(client, short, "inference", expires_in_s=10_000).status_code == 403
    assert _create(client, short, "inference", expires_in_s=50).status_code == 201


@pytest.mark.parametrize("body", [{"scopes": []}, {"scopes": ["nope"]}, {"name": ""}, {"expires_in_s": 0}, {"surprise": 1}])
def test_bad_key_requests_are_refused(client: TestClient, make_tenant: MakeTenant, body: dict) -> None:
    good = {"name": "k", "scopes": ["inference"]}
    reply = client.post("/api/v1/keys", json=good | body, headers=bearer(make_tenant("acme")))
    assert reply.status_code == 422
    assert next(iter(body)) in reply.json()["field"]


def test_tenants_neither_see_nor_revoke_each_others_keys(client: TestClient, make_tenant: MakeTenant, admin_token: str) -> None:
    mine, theirs = make_tenant("acme"), make_tenant("globex")
    listed = client.get("/api/v1/keys", headers=bearer(mine)).json()["items"]
    assert [item["id"] for item in listed] == [key_id_of(mine)]
    absent = client.delete("/api/v1/keys/AAAAAAAAAAAA", headers=bearer(mine))
    foreign = client.delete(f"/api/v1/keys/{key_id_of(theirs)}", headers=bearer(mine))
    assert absent.status_code == foreign.status_code == 404
    assert absent.json().keys() == foreign.json().keys()
    assert client.get("/api/v1/whoami", headers=bearer(theirs)).status_code == 200
    assert len(client.get("/api/v1/keys", headers=bearer(admin_token)).json()["items"]) == 3


def test_keys_of_another_tenant_through_an_admin_who_named_one(
    client: TestClient, make_tenant: MakeTenant, make_key: MakeKey, admin_token: str
) -> None:
    make_tenant("acme")
    theirs = make_tenant("globex")
    assert client.delete(f"/api/v1/keys/{key_id_of(theirs)}", headers=bearer(admin_token, "acme")).status_code == 404
    assert client.delete(f"/api/v1/keys/{key_id_of(theirs)}", headers=bearer(admin_token, "globex")).status_code == 204
