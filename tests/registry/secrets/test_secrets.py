"""Tenants' secrets over HTTP, and what stands in the database."""

from __future__ import annotations

import pytest
import structlog
from pydantic import SecretStr
from sqlalchemy import select
from starlette.testclient import TestClient

from registry.audit.models import AuditEvent
from registry.config import Settings
from registry.db import Database
from registry.errors import Invalid, NotFound
from registry.resealing import examine_secrets, reseal
from registry.sealing import Sealer, make_sealer
from registry.secrets import service
from registry.secrets.models import TenantSecret
from registry.tenants.models import Tenant
from tests.registry.conftest import SECRET_KEY, MakeKey, MakeTenant, bearer

VALUE = "hf_very_secret_value"


def put(client: TestClient, token: str, name: str = "hub-token", value: str = VALUE):
    return client.put(f"/api/v1/secrets/{name}", json={"value": value}, headers=bearer(token))


def test_a_secret_goes_in_and_never_comes_out(client: TestClient, make_tenant: MakeTenant, database: Database, settings: Settings) -> None:
    token = make_tenant("acme")
    with structlog.testing.capture_logs() as logs:
        made = put(client, token)
        listed = client.get("/api/v1/secrets", headers=bearer(token))
    assert made.status_code == 201
    assert [row["name"] for row in listed.json()] == ["hub-token"]
    with database.system_read() as session:
        row = session.scalars(select(TenantSecret)).one()
        events = session.scalars(select(AuditEvent).where(AuditEvent.resource_type == "secret")).all()
        assert service.value_of(session, row.tenant_id, "hub-token", sealer=make_sealer(settings)) == VALUE
    everything = made.text + listed.text + str(logs) + row.sealed + str([(event.before, event.after) for event in events])
    assert VALUE not in everything
    assert [event.action for event in events] == ["secret.created"]


def test_replacing_and_deleting(client: TestClient, make_tenant: MakeTenant, database: Database, settings: Settings) -> None:
    token = make_tenant("acme")
    assert put(client, token).status_code == 201
    assert put(client, token, value="second").status_code == 200
    with database.system_read() as session:
        tenant_id = session.scalars(select(Tenant.id)).one()
        assert service.value_of(session, tenant_id, "hub-token", sealer=make_sealer(settings)) == "second"
    assert client.delete("/api/v1/secrets/hub-token", headers=bearer(token)).status_code == 204
    assert client.delete("/api/v1/secrets/hub-token", headers=bearer(token)).json()["code"] == "secret_not_found"
    with database.system_read() as session, pytest.raises(NotFound):
        service.value_of(session, tenant_id, "hub-token", sealer=make_sealer(settings))


def test_tenants_do_not_meet(client: TestClient, make_tenant: MakeTenant, database: Database, settings: Settings) -> None:
    acme, globex = make_tenant("acme"), make_tenant("globex")
    put(client, acme)
    assert client.get("/api/v1/secrets", headers=bearer(globex)).json() == []
    assert client.delete("/api/v1/secrets/hub-token", headers=bearer(globex)).status_code == 404
    assert put(client, globex, value="theirs").status_code == 201
    with database.system_write() as session:  # a row copied across tenants by somebody who can write to the database
        mine, theirs = session.scalars(select(TenantSecret).join(Tenant, Tenant.id == TenantSecret.tenant_id).order_by(Tenant.name)).all()
        theirs.sealed = mine.sealed
    with database.system_read() as session, pytest.raises(Invalid) as refused:
        service.value_of(session, theirs.tenant_id, "hub-token", sealer=make_sealer(settings))
    assert refused.value.error_code == "secret_unreadable"


def test_what_is_refused(client: TestClient, make_tenant: MakeTenant, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch) -> None:
    token = make_tenant("acme")
    for name, value in (("Bad", "x"), (".x", "x"), ("a" * 64, "x"), ("ok", ""), ("ok", "x" * 8193)):
        assert put(client, token, name=name, value=value).status_code == 422, name
    assert VALUE not in client.put("/api/v1/secrets/ok", json={"value": [VALUE]}, headers=bearer(token)).text
    assert put(client, make_key("adapters:read", "keys:write", tenant="acme")).status_code == 403
    monkeypatch.setattr(service, "MAX_SECRETS", 1)
    assert put(client, token, name="one").status_code == 201
    assert put(client, token, name="two").status_code == 409
    assert put(client, token, name="one", value="again").status_code == 200


def test_doctor_and_reseal(client: TestClient, make_tenant: MakeTenant, database: Database) -> None:
    token = make_tenant("acme")
    put(client, token, name="one")
    put(client, token, name="two")
    changed = Sealer("another-secret-key-that-is-long-enough!", previous=[SECRET_KEY])
    with database.system_read() as session:
        report = examine_secrets(session, changed)
    assert (report.total, report.num_old, report.unreadable) == (2, 2, ())
    with database.system_write() as session:
        session.scalars(select(TenantSecret).where(TenantSecret.name == "two")).one().sealed = "v1.00000000.AAAA"
    with database.system_write() as session:
        report = reseal(session, changed)
    assert (report.num_old, len(report.unreadable)) == (1, 1)
    assert "two" in report.unreadable[0]
    with database.system_read() as session:
        row = session.scalars(select(TenantSecret).where(TenantSecret.name == "one")).one()
        alone = Sealer("another-secret-key-that-is-long-enough!")
        assert service.value_of(session, row.tenant_id, "one", sealer=alone) == VALUE


def test_an_installation_without_its_old_key_is_told(database: Database, client: TestClient, make_tenant: MakeTenant) -> None:
    put(client, make_tenant("acme"))
    stranger = make_sealer(Settings(secret_key=SecretStr("s" * 40)))
    with database.system_read() as session:
        assert len(examine_secrets(session, stranger).unreadable) == 1
