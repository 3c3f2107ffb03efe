"""Jobs over HTTP: scopes, tenants apart, what is shown and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from registry.db import Database
from registry.jobs import service
from tests.registry.conftest import MakeTenant, bearer


@pytest.fixture
def enqueue(database: Database, subject_of: Callable) -> Callable[[str | None], str]:
    def enqueue(token: str | None) -> str:
        subject = None if token is None else subject_of(token)
        with database.write() as session:
            return service.enqueue(
                session,
                kind="work",
                tenant_id=subject.tenant_id if subject else None,
                subject_id=subject.key_id if subject else "system",
                payload={"secret": "inside"},
            ).id

    return enqueue


def test_listing_and_showing(client: TestClient, make_tenant: MakeTenant, enqueue: Callable) -> None:
    token = make_tenant("acme")
    ids = [enqueue(token) for _ in range(3)]
    listed = client.get("/api/v1/jobs", headers=bearer(token)).json()["items"]
    assert sorted(item["id"] for item in listed) == sorted(ids)
    shown = client.get(f"/api/v1/jobs/{ids[0]}", headers=bearer(token))
    assert (shown.json()["state"], shown.json()["attempt"], shown.json()["max_attempts"]) == ("queued", 0, 5)
    assert "inside" not in shown.text
    assert client.get("/api/v1/jobs", params={"state": "failed"}, headers=bearer(token)).json()["items"] == []


def test_cancel(client: TestClient, make_tenant: MakeTenant, enqueue: Callable, database: Database) -> None:
    token = make_tenant("acme")
    job_id = enqueue(token)
    for _ in range(2):
        assert client.post(f"/api/v1/jobs/{job_id}/cancel", headers=bearer(token)).json()["state"] == "cancelled"
    other = enqueue(token)
    with database.write() as session:
        taken = service.claim(session, owner="w", kinds=["work"], lease_s=60)
        assert taken is not None
        service.finish(session, taken)
    assert client.post(f"/api/v1/jobs/{other}/cancel", headers=bearer(token)).status_code == 409
    actions = [event["action"] for event in client.get("/api/v1/audit", headers=bearer(token)).json()["items"]]
    assert "job.cancel_requested" in actions


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/v1/jobs/{id}"), ("POST", "/api/v1/jobs/{id}/cancel")])
def test_other_tenants_jobs_do_not_exist(client: TestClient, make_tenant: MakeTenant, enqueue: Callable, method: str, path: str) -> None:
    mine, theirs = make_tenant("acme"), make_tenant("globex")
    foreign, operators = enqueue(theirs), enqueue(None)
    bodies = []
    for job_id in (foreign, operators, "0" * 32):
        reply = client.request(method, path.format(id=job_id), headers=bearer(mine))
        assert reply.status_code == 404
        bodies.append(reply.text.replace(job_id, "ID").replace(reply.headers["x-request-id"], "REQUEST"))
    assert len(set(bodies)) == 1
    assert client.get("/api/v1/jobs", headers=bearer(mine)).json()["items"] == []


def test_admin_sees_all_or_one_tenant(client: TestClient, make_tenant: MakeTenant, enqueue: Callable, admin_token: str) -> None:
    enqueue(make_tenant("acme"))
    enqueue(None)
    assert len(client.get("/api/v1/jobs", headers=bearer(admin_token)).json()["items"]) == 2
    assert len(client.get("/api/v1/jobs", headers=bearer(admin_token, "acme")).json()["items"]) == 1


def test_scopes(client: TestClient, make_tenant: MakeTenant, enqueue: Callable) -> None:
    reader = make_tenant("acme", "jobs:read")
    job_id = enqueue(reader)
    assert client.get(f"/api/v1/jobs/{job_id}", headers=bearer(reader)).status_code == 200
    assert client.post(f"/api/v1/jobs/{job_id}/cancel", headers=bearer(reader)).status_code == 403
    assert client.get("/api/v1/jobs", headers=bearer(make_tenant("globex", "jobs:write"))).status_code == 403
