"""Where a change came from, rows that nobody changes, and the log as JSON Lines."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError
from starlette.testclient import TestClient

import migrations
from registry.app import create_app
from registry.audit import service
from registry.audit.service import record
from registry.audit.source import coming_from
from registry.config import Settings
from registry.db import Database
from registry.tenants.auth import SYSTEM
from tests.postgresql import PostgreSQL
from tests.registry.conftest import MakeKey, MakeTenant, bearer


def events(client: TestClient, token: str, **params: object) -> list[dict[str, Any]]:
    reply = client.get("/api/v1/audit", params=params, headers=bearer(token))
    assert reply.status_code == 200, reply.text
    return list(reply.json()["items"])


def export(client: TestClient, token: str, **params: object) -> list[dict[str, Any]]:
    reply = client.get("/api/v1/audit/export", params=params, headers=bearer(token))
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-ndjson"), reply.text
    return [json.loads(line) for line in reply.text.splitlines()]


# ---- source ----


@pytest.fixture
def proxied(settings: Settings, database: Database) -> Iterator[TestClient]:
    """Behind a proxy at 10.0.0.9, whose word is taken."""
    app = create_app(settings.model_copy(update={"trusted_proxies": ("10.0.0.0/24",)}))
    with TestClient(app, raise_server_exceptions=False, client=("10.0.0.9", 50000)) as client:
        yield client
    app.state.database.close()


def source_of(client: TestClient, admin_token: str, **headers: str) -> tuple[str | None, str | None]:
    made = client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token) | headers)
    assert made.status_code == 201
    (event,) = events(client, admin_token, action="tenant.created")
    return event["address"], event["user_agent"]


def test_a_trusted_proxy_is_believed_as_far_as_it_goes(proxied: TestClient, admin_token: str) -> None:
    forwarded = {"X-Forwarded-For": "6.6.6.6, 203.0.113.7, 10.0.0.3", "User-Agent": "curl/8"}
    assert source_of(proxied, admin_token, **forwarded) == ("203.0.113.7", "curl/8"), "6.6.6.6 is what the client itself claims"


def test_nobody_else_is_believed(client: TestClient, admin_token: str) -> None:
    address, _ = source_of(client, admin_token, **{"X-Forwarded-For": "203.0.113.7"})
    assert address == "testclient"


def test_a_long_user_agent_is_cut(client: TestClient, admin_token: str) -> None:
    _, user_agent = source_of(client, admin_token, **{"User-Agent": "x" * 5000})
    assert user_agent == "x" * 256


@pytest.mark.parametrize("proxies", ["everybody", "10.0.0.1/8", "*"])
def test_who_is_trusted_is_an_address_or_a_range(tmp_path: Path, proxies: str) -> None:
    with pytest.raises(ValueError, match="trusted_proxies"):
        Settings(state_dir=tmp_path, trusted_proxies=proxies)


def test_refusals_say_where_they_came_from(client: TestClient, make_tenant: MakeTenant, admin_token: str) -> None:
    client.post("/api/v1/tenants", json={"name": "evil"}, headers=bearer(make_tenant("acme", "adapters:read")) | {"User-Agent": "probe"})
    (refused,) = events(client, admin_token, outcome="refused")
    assert (refused["address"], refused["user_agent"]) == ("testclient", "probe")


def test_what_no_request_asked_for_has_no_address(database: Database) -> None:
    with database.write() as session, coming_from("1.2.3.4\0", user_agent="a\ud800b"):
        kept = record(session, SYSTEM, "thing.done", "thing", "1")
        assert (kept.address, kept.user_agent) == ("1.2.3.4", "a\\ud800b")
    with database.write() as session:
        assert record(session, SYSTEM, "thing.done", "thing", "2").address is None


# ---- append-only ----

CHANGES = ("UPDATE audit_events SET action = 'x.y'", "UPDATE audit_events SET action = 'x.y' WHERE false", "DELETE FROM audit_events")


def test_sqlite_keeps_every_event(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'lorary.sqlite3'}"
    migrations.upgrade(url)
    database = Database(url)
    with database.write() as session:
        record(session, SYSTEM, "thing.done", "thing", "1")
    for statement in (CHANGES[0], CHANGES[2]):
        with pytest.raises(DBAPIError, match="never changed or removed"), database.write() as session:
            session.execute(text(statement))
    database.close()


def test_postgresql_keeps_every_event_from_all_three_roles(postgresql_server: PostgreSQL) -> None:
    with postgresql_server.installation() as name:
        for role, url in postgresql_server.urls(name).items():
            engine = create_engine(url)
            for statement in (*CHANGES, "TRUNCATE audit_events"):
                with pytest.raises(DBAPIError, match=r"never changed or removed|permission denied"), engine.begin() as connection:
                    connection.execute(text(statement))
            engine.dispose()
            assert role


# ---- filters and export ----


@pytest.mark.postgresql
def test_filters(client: TestClient, make_tenant: MakeTenant, make_key: MakeKey) -> None:
    owner = make_tenant("acme")
    other = make_key("keys:write", "inference", tenant="acme")
    made = client.post("/api/v1/keys", json={"name": "k", "scopes": ["inference"]}, headers=bearer(other)).json()
    client.delete(f"/api/v1/keys/{made['id']}", headers=bearer(owner))
    by_other = events(client, owner, actor=made["created_by"])
    assert [event["action"] for event in by_other] == ["key.created"]
    assert [event["action"] for event in events(client, owner, resource_id=made["id"])] == ["key.revoked", "key.created"]
    assert {event["resource_type"] for event in events(client, owner, resource_type="tenant")} == {"tenant"}
    moment = by_other[0]["created_at"]
    assert events(client, owner, resource_id=made["id"], until=moment) == []
    assert len(events(client, owner, resource_id=made["id"], since=moment)) == 2
    assert export(client, owner, resource_id=made["id"], action="key.revoked")[0]["after"] == {"revoked": True}


@pytest.mark.parametrize("query", ["since=yesterday", "until=2026-01-01T00:00:00", "since=0001-01-01T00:00:00%2B23:00", "outcome=both"])
def test_filters_that_mean_nothing(client: TestClient, make_tenant: MakeTenant, query: str) -> None:
    token = make_tenant("acme")
    for route in ("audit", "audit/export"):
        assert client.get(f"/api/v1/{route}?{query}", headers=bearer(token)).status_code == 422


def many(database: Database, number: int) -> None:
    with database.write() as session:
        for index in range(number):
            record(session, SYSTEM, "thing.done", "thing", str(index))


@pytest.mark.postgresql
def test_the_export_is_whole_in_order_and_goes_on_where_it_broke_off(
    client: TestClient, database: Database, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "EXPORT_PAGE", 7)
    many(database, 30)
    whole = export(client, admin_token)
    assert {event["resource_id"] for event in whole if event["action"] == "thing.done"} == {str(index) for index in range(30)}
    assert [(event["created_at"], event["id"]) for event in whole] == sorted((event["created_at"], event["id"]) for event in whole)
    assert export(client, admin_token, after=whole[11]["id"]) == whole[12:]
    assert {event["id"] for event in events(client, admin_token, limit=500)} == {event["id"] for event in whole}


def test_the_export_reads_a_page_at_a_time_and_holds_nothing_meanwhile(
    database: Database, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "EXPORT_PAGE", 10)
    many(database, 35)
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement.split()[0]))
    lines = service.export(database, None, service.Wanted(), after=None)
    for num_pages in (1, 2, 3):
        assert len(next(lines).splitlines()) == 10
        assert statements.count("SELECT") == num_pages
        assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert b"".join(lines).count(b"\n") >= 5


def test_who_may_export(client: TestClient, make_tenant: MakeTenant, make_key: MakeKey, admin_token: str) -> None:
    mine, theirs = make_tenant("acme"), make_tenant("globex")
    auditor = make_key("audit:read", tenant="acme")
    own = export(client, auditor)
    assert len({event["tenant_id"] for event in own}) == 1
    assert {event["id"] for event in own}.isdisjoint({event["id"] for event in export(client, theirs)})
    assert client.get("/api/v1/audit/export", headers=bearer(make_key("inference", tenant="acme"))).status_code == 403
    assert client.post("/api/v1/keys", json={"name": "k", "scopes": ["audit:read"]}, headers=bearer(auditor)).status_code == 403
    foreign = client.get("/api/v1/audit/export", params={"after": own[0]["id"]}, headers=bearer(theirs))
    absent = client.get("/api/v1/audit/export", params={"after": "0" * 32}, headers=bearer(theirs))
    assert foreign.status_code == absent.status_code == 404
    assert len(export(client, admin_token)) > len(export(client, mine))


def test_a_moment_is_told_with_its_zone(client: TestClient, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    assert all(dt.datetime.fromisoformat(event["created_at"]).tzinfo for event in export(client, token))
