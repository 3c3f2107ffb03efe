"""What a tenant may have: bytes, adapters, versions a day, running jobs. Exact at the border, also for many at once."""

from __future__ import annotations

import datetime as dt
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from registry.adapters.models import AdapterVersion
from registry.audit.models import AuditEvent
from registry.blobs import service as blobs
from registry.blobs.models import Blob
from registry.config import Settings
from registry.db import Database, utc_now
from registry.jobs import service as jobs
from registry.tenants.models import Tenant
from registry.uploads.models import LargeUpload
from tests.registry.adapters import pushing
from tests.registry.adapters.conftest import acme, base_model, globex, operator, work, worker
from tests.registry.adapters.pushing import Pusher
from tests.registry.conftest import MakeKey, MakeTenant, bearer

__all__ = ["acme", "base_model", "globex", "operator", "work", "worker"]

Key = dict[str, str]
SetQuota = Callable[..., dict[str, Any]]


@pytest.fixture
def set_quota(client: TestClient, admin_token: str) -> SetQuota:
    """set_quota(tenant, bytes=5, ...): what the operator then sees."""

    def change(tenant: str, **limits: Any) -> dict[str, Any]:
        answer = client.patch(f"/api/v1/tenants/{tenant}/quota", headers=bearer(admin_token), json=limits)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    return change


@pytest.fixture
def key(make_tenant: MakeTenant) -> Key:
    return bearer(make_tenant("acme"))


def put(client: TestClient, key: Key, data: bytes) -> Any:
    return client.put(f"/api/v1/blobs/{hashlib.sha256(data).hexdigest()}", headers=key, content=data)


def quota(client: TestClient, key: Key) -> dict[str, Any]:
    answer = client.get("/api/v1/quota", headers=key)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_tenant_without_limits_sees_what_it_uses(client: TestClient, key: Key) -> None:
    assert put(client, key, b"12345").status_code == 201
    seen = quota(client, key)
    assert seen["tenant"] == "acme"
    assert seen["bytes"] == {"limit": None, "source": "default", "used": 5, "reserved": 0}
    assert seen["running_jobs"]["limit"] == 8
    assert seen["tokens_per_minute"] == {"limit": None, "source": "default", "used": 0, "reserved": 0}


@pytest.mark.postgresql
def test_bytes_to_the_last_one_and_not_one_more(client: TestClient, key: Key, set_quota: SetQuota, database: Database) -> None:
    set_quota("acme", bytes=10)
    assert put(client, key, b"123456").status_code == 201
    refused = put(client, key, b"abcde")
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (403, "quota_exceeded", "bytes")
    assert "10 bytes and has 6; 5 more" in refused.json()["detail"]
    assert put(client, key, b"abcd").status_code == 201
    assert put(client, key, b"123456").status_code == 200, "what is there costs nothing"
    assert quota(client, key)["bytes"] == {"limit": 10, "source": "tenant", "used": 10, "reserved": 0}
    with database.write() as session:
        blobs.forget(session, session.scalars(select(Tenant.id)).one(), hashlib.sha256(b"123456").hexdigest())
    assert quota(client, key)["bytes"]["used"] == 4
    assert put(client, key, b"fghij").status_code == 201, "what goes makes room"


def test_bytes_of_unknown_length_end_where_the_room_ends(client: TestClient, key: Key, set_quota: SetQuota) -> None:
    set_quota("acme", bytes=10)
    data = b"x" * 11
    answer = client.put(f"/api/v1/blobs/{hashlib.sha256(data).hexdigest()}", headers=key, content=iter([data]))
    assert answer.status_code == 413, answer.text
    assert quota(client, key)["bytes"]["used"] == 0


@pytest.mark.postgresql
def test_many_uploads_at_once_never_exceed(client: TestClient, key: Key, set_quota: SetQuota) -> None:
    set_quota("acme", bytes=40)
    start = threading.Barrier(8)

    def send(number: int) -> int:
        start.wait()
        return int(put(client, key, b"%010d" % number).status_code)

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(send, range(8)))
    assert statuses == [201] * 4 + [403] * 4
    assert quota(client, key)["bytes"]["used"] == 40


def test_an_upload_in_parts_counts_from_its_beginning(client: TestClient, key: Key, set_quota: SetQuota, database: Database) -> None:
    set_quota("acme", bytes=100)
    begun = client.post("/api/v1/uploads", headers=key, json={"sha256": "a" * 64, "size": 70})
    assert begun.status_code == 201
    assert quota(client, key)["bytes"] == {"limit": 100, "source": "tenant", "used": 0, "reserved": 70}
    second = client.post("/api/v1/uploads", headers=key, json={"sha256": "b" * 64, "size": 31})
    assert (second.status_code, second.json()["code"]) == (403, "quota_exceeded")
    assert client.post("/api/v1/uploads", headers=key, json={"sha256": "a" * 64, "size": 70}).status_code == 200, "the same one again"
    assert client.delete(f"/api/v1/uploads/{begun.json()['id']}", headers=key).status_code == 204
    assert quota(client, key)["bytes"]["reserved"] == 0
    third = client.post("/api/v1/uploads", headers=key, json={"sha256": "b" * 64, "size": 100})
    assert third.status_code == 201
    with database.write() as session:
        session.execute(update(LargeUpload).values(expires_at=utc_now()))
    assert client.post("/api/v1/uploads", headers=key, json={"sha256": "c" * 64, "size": 100}).status_code == 201, "that one expired"


@pytest.mark.postgresql
def test_adapters_and_versions_a_day(acme: Pusher, set_quota: SetQuota, database: Database) -> None:
    set_quota("acme", adapters=1, versions_per_day=2)
    first, second, third = (pushing.adapter(seed) for seed in range(3))
    assert acme.push("one", first).status_code == 201
    refused = acme.push("two", second)
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (403, "quota_exceeded", "adapters")
    assert acme.push("one", first).status_code == 200, "the same bytes are no new version"
    assert acme.push("one", second).status_code == 201
    refused = acme.push("one", third)
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (429, "quota_exceeded", "versions_per_day")
    assert 0 < int(refused.headers["Retry-After"]) <= 86_400
    with database.write() as session:
        yesterday = session.scalars(select(AdapterVersion.created_at)).first()
        assert yesterday is not None
        session.execute(update(AdapterVersion).values(created_at=yesterday - dt.timedelta(days=1)))
    assert acme.push("one", third).status_code == 201, "a new day"
    assert acme.call("DELETE", "/adapters/one").status_code == 204
    assert acme.push("two", pushing.adapter(9)).status_code == 201, "an adapter that went makes room"
    restored = acme.push("one", first)
    assert (restored.status_code, restored.json()["field"]) == (403, "adapters"), "restoring needs room too"


@pytest.mark.postgresql
def test_many_pushes_at_once_never_exceed(acme: Pusher, globex: Pusher, set_quota: SetQuota) -> None:
    set_quota("acme", adapters=3, versions_per_day=5)
    files = pushing.adapter(1)
    for tenant in (acme, globex):
        assert tenant.push("first", files).status_code == 201
    start = threading.Barrier(8)

    def push(number: int) -> int:
        start.wait()
        return int((acme if number < 6 else globex).push(f"more-{number}", files).status_code)

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(push, range(8)))
    assert sorted(statuses[:6]) == [201, 201, 403, 403, 403, 403]
    assert statuses[6:] == [201, 201], "another tenant's quota is another one"
    seen = acme.get("/quota")
    assert (seen["adapters"]["used"], seen["versions_per_day"]["used"]) == (3, 3)


@pytest.mark.postgresql
def test_a_tenants_running_jobs_follow_its_quota(database: Database, key: Key, set_quota: SetQuota, client: TestClient) -> None:
    with database.write() as session:
        tenant_id = session.scalars(select(Tenant.id)).one()
        for _ in range(3):
            jobs.enqueue(session, kind="work", tenant_id=tenant_id, subject_id="key", payload={})

    def claims(max_running: int) -> bool:
        with database.write() as session:
            return jobs.claim(session, owner="one", kinds=["work"], lease_s=60, max_running=max_running) is not None

    set_quota("acme", running_jobs=0)
    assert not claims(8), "0: none"
    set_quota("acme", running_jobs=1)
    assert [claims(8), claims(8)] == [True, False], "less than the operator's"
    set_quota("acme", running_jobs=None)
    assert [claims(1), claims(2), claims(2)] == [False, True, False], "the operator's"
    set_quota("acme", running_jobs="unlimited")
    assert claims(1)
    assert quota(client, key)["running_jobs"] == {"limit": None, "source": "tenant", "used": 3, "reserved": 0}


def test_only_operators_set_quotas_and_every_change_is_audited(
    client: TestClient, key: Key, set_quota: SetQuota, make_key: MakeKey, database: Database
) -> None:
    assert client.patch("/api/v1/tenants/acme/quota", headers=key, json={"bytes": "unlimited"}).status_code == 403
    assert client.get("/api/v1/quota", headers=bearer(make_key("inference", tenant="acme"))).status_code == 403
    set_quota("acme", bytes=7, adapters="unlimited")
    set_quota("acme", bytes=7)
    set_quota("acme", bytes=None)
    with database.read() as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.action == "quota.changed").order_by(AuditEvent.created_at)).all()
    assert [(event.before, event.after) for event in events] == [
        ({"bytes": None, "adapters": None}, {"bytes": 7, "adapters": "unlimited"}),
        ({"bytes": 7}, {"bytes": None}),
    ]
    for wrong in ({"bytes": -1}, {"bytes": "much"}, {"bytes": True}, {"bytes": 1.5}, {"bytes": 2**53}, {"disk": 1}):
        answer = client.patch("/api/v1/tenants/acme/quota", headers=bearer(make_key("admin")), json=wrong)
        assert answer.status_code == 422, (wrong, answer.text)
    assert client.patch("/api/v1/tenants/nobody/quota", headers=bearer(make_key("admin")), json={"bytes": 1}).status_code == 404


class TestDefaults:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"quota_bytes": 4, "quota_adapters": 0})

    def test_of_the_operator_hold_where_a_quota_says_nothing(self, client: TestClient, key: Key, set_quota: SetQuota) -> None:
        assert quota(client, key)["bytes"] == {"limit": 4, "source": "default", "used": 0, "reserved": 0}
        assert put(client, key, b"12345").status_code == 403
        set_quota("acme", bytes="unlimited")
        assert put(client, key, b"12345").status_code == 201
        assert quota(client, key)["adapters"]["limit"] == 0


@pytest.mark.postgresql
def test_the_application_may_not_raise_a_limit(
    client: TestClient, key: Key, set_quota: SetQuota, settings: Settings, database: Database
) -> None:
    """On PostgreSQL: a tenant's transaction may lock the row and make it, and neither set nor change a limit."""
    set_quota("acme", bytes=10)
    assert put(client, key, b"123").status_code == 201
    if not settings.database_system_url:
        return
    from sqlalchemy import text
    from sqlalchemy.exc import ProgrammingError

    from registry.db import open_database, reaching_tenant

    with database.read() as session:
        tenant_id = session.scalars(select(Tenant.id)).one()
        assert session.scalar(select(func.count()).select_from(Blob)) == 1
    own = open_database(settings)
    try:
        for attack in ("UPDATE quotas SET bytes = -1", "INSERT INTO quotas (tenant_id, bytes, updated_at) VALUES ('x', -1, now())"):
            with reaching_tenant(tenant_id), pytest.raises(ProgrammingError, match="permission denied"), own.write() as session:
                session.execute(text(attack))
    finally:
        own.close()
