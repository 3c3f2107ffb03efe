"""The application around the endpoints: error shapes, request ids, limits, outages, probes, the OpenAPI document."""

from __future__ import annotations

from fastapi.testclient import TestClient

from tests.registry.conftest import bearer


def test_whoami(client: TestClient, admin_token: str) -> None:
    reply = client.get("/api/v1/whoami", headers=bearer(admin_token))
    assert reply.status_code == 200, reply.text
    assert reply.json()["scopes"] == ["admin"]
