"""The audit log: with the change or not at all, refusals by themselves, tenants apart."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from registry.audit.models import AuditEvent
from registry.audit.service import record
from registry.db import Database
from registry.errors import Conflict
from registry.tenants import service
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import key_id_of, new_key
from tests.registry.conftest import MakeTenant, bearer


def events(client: TestClient, token: str, **params: object) -> list[dict]:
    reply = client.get("/api/v1/audit", params=params, headers=bearer(token))
    assert reply.status_code == 200, reply.text
    return reply.json()["items"]


def test_changes_name_subject_request_and_both_sides(client: TestClient, admin_token: str) -> None:
    made = client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token))
    client.delete("/api/v1/tenants/acme", headers=bearer(admin_token))
    deleted, created = (event for event in events(client, admin_token) if event["action"].startswith("tenant."))
    assert (created["action"], created["after"], created["before"]) == ("tenant.created", {"name": "acme"}, None)
    assert (deleted["action"], deleted["before"]) == ("tenant.deleted", {"name": "acme"})
    assert created["key_id"] == key_id_of(admin_token)
    assert created["request_id"] == made.headers["x-request-id"]
    assert created["resource_id"] == created["tenant_id"] == made.json()["id"]


def test_a_change_that_rolls_back_leaves_no_event(database: Database) -> None:
    with pytest.raises(Conflict), database.write() as session:
        service.create_tenant(session, subject=SYSTEM, name="acme", record=record)
        service.create_tenant(session, subject=SYSTEM, name="acme", record=record)
    with database.read() as session:
        assert session.query(AuditEvent).count() == 0


def test_missing_scope_is_recorded_in_its_own_transaction(client: TestClient, make_tenant: MakeTenant, admin_token: str) -> None:
    token = make_tenant("acme", "adapters:read")
    assert client.post("/api/v1/tenants", json={"name": "evil"}, headers=bearer(token)).status_code == 403
    (event,) = events(client, admin_token, action="request.refused")
    assert (event["outcome"], event["key_id"], event["resource_id"]) == ("refused", key_id_of(token), "/api/v1/tenants")
    assert event["after"]["status"] == 403
    assert "admin" in event["after"]["reason"]


def test_a_refusal_inside_a_write_transaction_is_recorded_too(client: TestClient, make_tenant: MakeTenant, admin_token: str) -> None:
    token = make_tenant("acme", "keys:write")
    reply = client.post("/api/v1/keys", json={"name": "k", "scopes": ["inference"]}, headers=bearer(token))
    assert reply.status_code == 403
    assert len(events(client, admin_token, action="request.refused")) == 1


def test_use_of_a_revoked_key_is_recorded_with_the_reason(client: TestClient, make_tenant: MakeTenant, admin_token: str) -> None:
    token = make_tenant("acme")
    client.delete(f"/api/v1/keys/{key_id_of(token)}", headers=bearer(admin_token))
    client.get("/api/v1/whoami", headers=bearer(token))
    (event,) = events(client, admin_token, action="request.refused")
    assert (event["after"]["reason"], event["key_id"]) == ("revoked", key_id_of(token))
    assert event["tenant_id"] is not None


def test_strangers_fill_no_tables(client: TestClient, admin_token: str) -> None:
    client.get("/api/v1/whoami", headers=bearer(new_key().token))
    client.get("/api/v1/whoami")
    assert events(client, admin_token, action="request.refused") == []


def test_tenants_read_their_own_events_alone(client: TestClient, make_tenant: MakeTenant, admin_token: str) -> None:
    mine, theirs = make_tenant("acme"), make_tenant("globex")
    tenant_ids = {event["tenant_id"] for event in events(client, mine)}
    assert len(tenant_ids) == 1
    assert tenant_ids.isdisjoint({event["tenant_id"] for event in events(client, theirs)})
    assert len(events(client, admin_token)) > len(events(client, mine))


def test_reading_needs_the_right_to_hand_out_keys(client: TestClient, make_tenant: MakeTenant) -> None:
    assert client.get("/api/v1/audit", headers=bearer(make_tenant("acme", "adapters:read"))).status_code == 403


def test_no_token_in_any_event(client: TestClient, admin_token: str, make_tenant: MakeTenant) -> None:
    owner = make_tenant("acme")
    made = client.post("/api/v1/keys", json={"name": "k", "scopes": ["inference"]}, headers=bearer(owner)).json()
    log = client.get("/api/v1/audit", params={"limit": 500}, headers=bearer(admin_token)).text
    assert made["id"] in log
    assert made["token"][-30:] not in log
