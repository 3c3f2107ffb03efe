"""Who gets in: checksum before any query, one query, expiry by the database's clock, revocation at once."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, update

from registry.db import Database, database_time
from registry.errors import Unauthenticated
from registry.tenants import service
from registry.tenants.auth import SYSTEM, KeyRefused, authenticate
from registry.tenants.keys import SCOPES, KeyHasher, key_id_of, new_key
from registry.tenants.models import ApiKey
from tests.registry.conftest import MakeKey, MakeTenant, bearer


@contextmanager
def counted_statements(database: Database) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_connection, _cursor, statement: str, *_rest: object) -> None:
        if not statement.startswith(("BEGIN", "PRAGMA", "EXPLAIN", "SELECT set_config(")):
            seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


def test_one_query_names_key_tenant_and_scopes(database: Database, hasher: KeyHasher, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme", "adapters:read", "inference")
    with counted_statements(database) as seen, database.read() as session:
        subject = authenticate(session, token, hasher)
    assert len(seen) == 1
    assert (subject.tenant, subject.scopes) == ("acme", frozenset({"adapters:read", "inference"}))


@pytest.mark.sqlite
def test_the_query_uses_the_primary_keys(database: Database, hasher: KeyHasher, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    with counted_statements(database) as seen, database.read() as session:
        authenticate(session, token, hasher)
        parameters = (None,) * (seen[0].count("?") - 1) + (key_id_of(token),)
        plan = session.connection().exec_driver_sql("EXPLAIN QUERY PLAN " + seen[0], parameters).all()
    assert not [row for row in plan if "SCAN" in row[3] and row[3] != "SCAN CONSTANT ROW"], plan  # that is the clock


def test_bad_checksum_is_refused_before_any_query(database: Database, hasher: KeyHasher, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    mistyped = token[:-1] + ("a" if token[-1] != "a" else "b")
    with counted_statements(database) as seen, database.read() as session, pytest.raises(Unauthenticated, match="checksum"):
        authenticate(session, mistyped, hasher)
    assert seen == []


def test_right_id_with_another_secret_is_refused(database: Database, hasher: KeyHasher, make_tenant: MakeTenant, monkeypatch) -> None:
    mine = make_tenant("acme")
    monkeypatch.setattr("registry.tenants.keys._random", lambda length: key_id_of(mine) if length == 12 else "A" * length)
    forged = new_key().token
    assert key_id_of(forged) == key_id_of(mine)
    with database.read() as session, pytest.raises(KeyRefused) as refused:
        authenticate(session, forged, hasher)
    assert refused.value.reason == "wrong_secret"


def test_key_of_another_installation_is_refused(database: Database, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    with database.read() as session, pytest.raises(KeyRefused):
        authenticate(session, token, KeyHasher("another-secret-key-of-enough-characters"))


def test_expiry_is_by_the_database_clock(client: TestClient, database: Database, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    assert client.get("/api/v1/whoami", headers=bearer(token)).status_code == 200
    for offset, status in ((dt.timedelta(seconds=30), 200), (dt.timedelta(milliseconds=-1), 401)):
        with database.write() as session:
            session.execute(update(ApiKey).values(expires_at=database_time(session) + offset))
        assert client.get("/api/v1/whoami", headers=bearer(token)).status_code == status


def test_revocation_is_immediate_and_idempotent(client: TestClient, admin_token: str, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    for _ in range(2):
        assert client.delete(f"/api/v1/keys/{key_id_of(token)}", headers=bearer(admin_token)).status_code == 204
        assert client.get("/api/v1/whoami", headers=bearer(token)).status_code == 401


def test_deleted_tenant_stops_its_keys_at_once(client: TestClient, admin_token: str, make_tenant: MakeTenant) -> None:
    token, other = make_tenant("acme"), make_tenant("globex")
    assert client.delete("/api/v1/tenants/acme", headers=bearer(admin_token)).status_code == 204
    assert client.get("/api/v1/whoami", headers=bearer(token)).status_code == 401
    assert client.get("/api/v1/whoami", headers=bearer(other)).status_code == 200


def test_all_refusals_of_a_well_formed_key_read_the_same(client: TestClient, admin_token: str, make_tenant: MakeTenant) -> None:
    """Or a guesser would learn which ids exist."""
    revoked, orphaned = make_tenant("acme"), make_tenant("globex")
    client.delete(f"/api/v1/keys/{key_id_of(revoked)}", headers=bearer(admin_token))
    client.delete("/api/v1/tenants/globex", headers=bearer(admin_token))
    said = set()
    for token in (revoked, orphaned, new_key().token):
        reply = client.get("/api/v1/whoami", headers=bearer(token))
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        said.add(reply.json()["detail"])
    assert len(said) == 1


@pytest.mark.parametrize("header", ["", "Basic abc", "Bearer", "Bearer  ", "lry_x"])
def test_missing_or_foreign_credentials(client: TestClient, header: str) -> None:
    reply = client.get("/api/v1/whoami", headers={"Authorization": header})
    assert reply.status_code == 401
    assert reply.json()["field"] == "Authorization"


def test_admin_acts_inside_the_tenant_it_names(client: TestClient, admin_token: str, make_tenant: MakeTenant) -> None:
    make_tenant("acme")
    assert client.get("/api/v1/whoami", headers=bearer(admin_token)).json()["tenant"] is None
    assert client.get("/api/v1/whoami", headers=bearer(admin_token, "acme")).json()["tenant"] == "acme"
    assert client.get("/api/v1/whoami", headers=bearer(admin_token, "nobody")).status_code == 404


def test_tenant_key_cannot_enter_another_tenant_nor_learn_of_it(client: TestClient, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    make_tenant("globex")
    replies = [client.get("/api/v1/whoami", headers=bearer(token, name)) for name in ("globex", "nobody")]
    assert [reply.status_code for reply in replies] == [403, 403]
    assert replies[0].json()["detail"] == replies[1].json()["detail"]
    assert client.get("/api/v1/whoami", headers=bearer(token, "acme")).status_code == 200


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_what_a_scope_implies(scope: str, make_key: MakeKey, make_tenant: MakeTenant, subject_of: Callable) -> None:
    """`admin` is everything but `replica`; every other scope is itself alone."""
    make_tenant("acme")
    subject = subject_of(make_key(scope, tenant=None if scope in {"admin", "replica"} else "acme"))
    expected = SCOPES - {"replica"} if scope == "admin" else {scope}
    assert {name for name in SCOPES if subject.has(name)} == expected


def test_last_use_is_written_in_a_batch_and_authentication_never_writes(
    client: TestClient, database: Database, make_tenant: MakeTenant, app
) -> None:
    token = make_tenant("acme")
    with counted_statements(database) as seen:
        client.get("/api/v1/whoami", headers=bearer(token))
    assert not [statement for statement in seen if statement.startswith(("UPDATE", "INSERT"))]
    app.state.last_used.flush()
    with database.read() as session:
        key = session.get(ApiKey, key_id_of(token))
        assert key is not None
        assert key.last_used_at is not None
        assert abs(key.last_used_at - database_time(session)) < dt.timedelta(seconds=20)


@pytest.mark.sqlite
def test_last_use_survives_a_busy_database(database: Database, settings, make_tenant: MakeTenant) -> None:
    from registry.tenants.last_used import LastUsed

    token = make_tenant("acme")
    impatient = Database(settings.resolved_database_url, busy_timeout_s=0.05)
    last_used = LastUsed(impatient)
    last_used.seen(key_id_of(token))
    with database.write() as session:
        session.execute(update(ApiKey).values(name="held"))
        last_used.flush()  # cannot write now, and must neither raise nor forget
    last_used.stop()
    impatient.close()
    with database.read() as session:
        key = session.get(ApiKey, key_id_of(token))
        assert key is not None
        assert key.last_used_at is not None


def test_authentication_does_not_wait_for_a_writer(client: TestClient, database: Database, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    with database.write() as session:
        session.execute(update(ApiKey).values(name="held"))
        assert client.get("/api/v1/whoami", headers=bearer(token)).status_code == 200


@pytest.mark.sqlite
def test_a_secret_is_nowhere_in_the_database(database: Database, settings, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    with database.write() as session:
        service.create_tenant(session, subject=SYSTEM, name="x", record=lambda *_, **__: None)
    database.close()
    stored = b"".join(path.read_bytes() for path in settings.state_dir.glob("lorary.sqlite3*"))
    assert key_id_of(token).encode() in stored
    assert token.rpartition("_")[2].encode() not in stored
