"""`/webhooks` over HTTP: what is made, shown, changed, refused, and what other tenants see of it."""

from __future__ import annotations

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from registry.audit.models import AuditEvent
from registry.db import Database
from registry.resealing import examine_secrets
from registry.sealing import Sealer
from registry.webhooks import service
from registry.webhooks.models import WebhookDelivery, WebhookEndpoint
from tests.registry.conftest import SECRET_KEY, MakeKey, MakeTenant, bearer
from tests.registry.webhooks.conftest import Hook
from tests.registry.webhooks.receiving import Receiver


def test_the_secret_is_told_once_and_stored_sealed(*, client: TestClient, token: str, hook: Hook, database: Database) -> None:
    assert hook["secret"].startswith("whsec_")
    shown = client.get("/api/v1/webhooks", headers=bearer(token))
    assert [row["id"] for row in shown.json()] == [hook["id"]]
    with database.system_read() as session:
        row = session.scalars(select(WebhookEndpoint)).one()
        events = session.scalars(select(AuditEvent).where(AuditEvent.resource_type == "webhook")).all()
        assert examine_secrets(session, Sealer(SECRET_KEY)).total == 1
    everything = shown.text + row.secret + str([(event.before, event.after) for event in events])
    assert hook["secret"].removeprefix("whsec_") not in everything
    assert "token=private" not in str([event.after for event in events]), "receivers keep tokens in queries"


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/", "https://169.254.169.254/latest", "ftp://x.example/", "https://u:p@x.example/", "https://2130706433/", ""]
)
def test_urls_that_lead_inside_are_refused_at_once(*, client: TestClient, token: str, hook: Hook, url: str) -> None:
    made = client.post("/api/v1/webhooks", json={"url": url, "event_types": ["*"]}, headers=bearer(token))
    changed = client.patch(f"/api/v1/webhooks/{hook['id']}", json={"url": url}, headers=bearer(token))
    assert (made.status_code, changed.status_code) == (422, 422)


@pytest.mark.parametrize("change", [{}, {"event_types": []}, {"event_types": ["no.such"]}, {"surprise": 1}, {"enabled": "maybe"}])
def test_bad_bodies(*, client: TestClient, token: str, hook: Hook, change: Hook) -> None:
    assert client.patch(f"/api/v1/webhooks/{hook['id']}", json=change, headers=bearer(token)).status_code == 422


def test_change_disable_and_delete(*, client: TestClient, token: str, hook: Hook, database: Database) -> None:
    route = f"/api/v1/webhooks/{hook['id']}"
    changed = client.patch(
        route, json={"event_types": ["alias.moved"], "description": "ops", "enabled": False}, headers=bearer(token)
    ).json()
    assert (changed["event_types"], changed["description"], changed["enabled"]) == (["alias.moved"], "ops", False)
    assert client.patch(route, json={"enabled": True}, headers=bearer(token)).json()["enabled"]
    assert client.post(f"{route}/ping", headers=bearer(token)).status_code == 202
    assert client.delete(route, headers=bearer(token)).status_code == 204
    assert client.get(route, headers=bearer(token)).status_code == 404
    with database.system_read() as session:
        assert session.scalars(select(WebhookDelivery)).all() == []


def test_deleting_a_webhook_while_its_delivery_is_under_way(
    *, client: TestClient, token: str, hook: Hook, ears: Receiver, deliverer: object, database: Database
) -> None:
    from registry.webhooks import delivery
    from registry.webhooks.delivery import DeliveryLimits, Outcome

    client.post(f"/api/v1/webhooks/{hook['id']}/ping", headers=bearer(token))
    with database.system_write() as session:
        claimed = delivery.claim(session, DeliveryLimits())
    assert claimed is not None
    client.delete(f"/api/v1/webhooks/{hook['id']}", headers=bearer(token))
    with database.system_write() as session:
        assert delivery.keep(session, claimed, Outcome(200, 1), DeliveryLimits()) is None


def test_what_is_theirs_looks_like_what_never_was(
    *, client: TestClient, token: str, hook: Hook, make_tenant: MakeTenant, database: Database
) -> None:
    delivery_id = client.post(f"/api/v1/webhooks/{hook['id']}/ping", headers=bearer(token)).json()["id"]
    other = bearer(make_tenant("globex"))
    assert client.get("/api/v1/webhooks", headers=other).json() == []
    for method, tail, body in (
        ("GET", "", None),
        ("PATCH", "", {"enabled": False}),
        ("DELETE", "", None),
        ("POST", "/rotate", {"overlap_s": 0}),
        ("POST", "/ping", None),
        ("GET", "/deliveries", None),
        ("GET", f"/deliveries/{delivery_id}", None),
        ("POST", f"/deliveries/{delivery_id}/replay", None),
    ):
        theirs, nothing = (
            client.request(method, f"/api/v1/webhooks/{row}{tail}", json=body, headers=other) for row in (hook["id"], "0" * 32)
        )
        assert theirs.status_code == nothing.status_code == 404
        assert theirs.json()["detail"].replace(hook["id"], "*") == nothing.json()["detail"].replace("0" * 32, "*")


def test_scopes_and_limits(*, client: TestClient, token: str, make_key: MakeKey, ears: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"url": ears.url, "event_types": ["*"]}
    weak = bearer(make_key("adapters:read", "keys:write", "secrets:write", tenant="hooked"))
    assert client.post("/api/v1/webhooks", json=body, headers=weak).status_code == 403
    assert client.get("/api/v1/webhooks", headers=weak).status_code == 403
    monkeypatch.setattr(service, "MAX_ENDPOINTS", 1)
    assert client.post("/api/v1/webhooks", json=body, headers=bearer(token)).status_code == 201
    assert client.post("/api/v1/webhooks", json=body, headers=bearer(token)).status_code == 409


def test_the_log_pages_and_filters(*, client: TestClient, token: str, hook: Hook) -> None:
    made = [client.post(f"/api/v1/webhooks/{hook['id']}/ping", headers=bearer(token)).json()["id"] for _ in range(3)]
    route = f"/api/v1/webhooks/{hook['id']}/deliveries"
    first = client.get(route, params={"limit": 2}, headers=bearer(token)).json()
    second = client.get(route, params={"limit": 2, "cursor": first["next_cursor"]}, headers=bearer(token)).json()
    assert [row["id"] for row in first["items"] + second["items"]] == made[::-1]
    assert client.get(route, params={"state": "failed"}, headers=bearer(token)).json()["items"] == []
    assert client.get(route, params={"state": "odd"}, headers=bearer(token)).status_code == 422
