"""Races on PostgreSQL, where writers really meet: row locks, skipped locks, unique constraints."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from registry.audit.models import AuditEvent
from registry.audit.service import record
from registry.db import Database, WriteSession
from registry.jobs import repository
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.pagination import after_cursor, make_page
from registry.quotas import repository as quotas
from registry.quotas.models import Quota
from registry.tenants.auth import SYSTEM
from registry.tenants.service import get_tenant
from tests.registry.adapters import pushing
from tests.registry.adapters.conftest import acme, base_model, globex, operator, work, worker
from tests.registry.adapters.pushing import Pusher
from tests.registry.conftest import MakeTenant, bearer

__all__ = ["acme", "base_model", "globex", "operator", "work", "worker"]


@pytest.fixture
def database_kind() -> str:
    return "postgresql"


def at_once(count: int, do: Callable[[int], Any]) -> list[Any]:
    start = threading.Barrier(count)

    def wait_and_do(number: int) -> Any:
        start.wait()
        return do(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_do, range(count)))


def test_a_claim_lets_go_of_the_quota_of_a_tenant_that_it_passes_over(
    database: Database, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who holds one tenant's row while it waits for another's meets who holds them the other way round."""
    tenant_ids = []
    for name in ("one", "two"):
        make_tenant(name)
        with database.write() as session:
            tenant_ids.append(get_tenant(session, name).id)
            jobs.enqueue(session, kind="work", tenant_id=tenant_ids[-1], subject_id="key", payload={})
        with database.write() as session:
            quotas.lock(session, tenant_ids[-1])  # makes the row
    look, looked = repository.lock_claimable, []

    def gone_at_first(session: WriteSession, job_id: str, **options: Any) -> Job | None:
        looked.append(job_id)
        if len(looked) == 1:
            return None
        with database.write() as other:
            free = select(Quota.tenant_id).where(Quota.tenant_id.in_(tenant_ids)).with_for_update(skip_locked=True)
            assert other.scalars(free).all() == tenant_ids[:1], "only the row of the job in hand is held"
        return look(session, job_id, **options)

    monkeypatch.setattr(repository, "lock_claimable", gone_at_first)
    with database.write() as session:
        taken = jobs.claim(session, owner="a", kinds=["work"], lease_s=60)
    assert taken is not None
    assert (taken.job_id, taken.tenant_id) == (looked[1], tenant_ids[1])


def test_many_claimers_never_share_a_job(database: Database) -> None:
    with database.write() as session:
        for _ in range(40):
            jobs.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={})
    start = threading.Barrier(8)

    def work(owner: str) -> list[str]:
        start.wait()
        mine = []
        while True:
            with database.write() as session:
                taken = jobs.claim(session, owner=owner, kinds=["work"], lease_s=60)
            if taken is None:
                return mine
            mine.append(taken.job_id)
            with database.write() as session:
                jobs.finish(session, taken)

    with ThreadPoolExecutor(8) as pool:
        claimed = [job_id for ids in pool.map(work, map(str, range(8))) for job_id in ids]
    assert len(claimed) == len(set(claimed)) == 40


def test_cancel_against_release_never_strands_a_job(database: Database) -> None:
    """Queued again with a cancellation nobody will hear would be a job that stays for ever."""
    for _ in range(30):
        with database.write() as session:
            job_id = jobs.enqueue(session, kind="work", tenant_id=None, subject_id="key", payload={}).id
        with database.write() as session:
            taken = jobs.claim(session, owner="one", kinds=["work"], lease_s=60)
            assert taken is not None
        start = threading.Barrier(2)

        def release(start: threading.Barrier = start, taken: jobs.Claim = taken) -> None:
            start.wait()
            with database.write() as session:
                jobs.release(session, taken)

        def cancel(start: threading.Barrier = start, job_id: str = job_id) -> None:
            start.wait()
            try:
                with database.write() as session:
                    jobs.cancel(session, None, job_id)
            except jobs.Conflict:
                with database.write() as session:
                    jobs.cancel(session, None, job_id)

        with ThreadPoolExecutor(2) as pool:
            for done in (pool.submit(release), pool.submit(cancel)):
                done.result()
        with database.read() as session:
            assert session.get_one(Job, job_id).state == "cancelled"


def test_cursors_cover_everything_once(database: Database) -> None:
    with database.write() as session:
        for number in range(23):
            record(session, SYSTEM, "a.b", "t", str(number))
    seen: list[str] = []
    cursor = None
    while True:
        with database.read() as session:
            rows = session.scalars(after_cursor(select(AuditEvent), cursor, at=AuditEvent.created_at, row_id=AuditEvent.id, limit=4)).all()
        page = make_page(rows, limit=4, key=lambda row: (row.created_at, row.id), show=lambda row: row.resource_id)
        seen, cursor = seen + page.items, page.next_cursor
        if cursor is None:
            break
    assert sorted(seen) == sorted(str(number) for number in range(23))


def test_equal_pushes_at_once_are_one_version(acme: Pusher, work: Callable[[], int]) -> None:
    made = pushing.adapter(1)
    acme.upload(made.files)
    answers = [answer.status_code for answer in at_once(6, lambda _: acme.push("pirate", made))]
    assert Counter(answers) == {201: 1, 200: 5}
    assert work() == 1
    assert [row["number"] for row in acme.get("/adapters/pirate/versions")["items"]] == [1]


def test_different_pushes_at_once_get_numbers_without_gaps(acme: Pusher, work: Callable[[], int]) -> None:
    answers = at_once(5, lambda seed: acme.push("pirate", pushing.adapter(seed)))
    assert [answer.status_code for answer in answers] == [201] * 5
    assert sorted(answer.json()["number"] for answer in answers) == [1, 2, 3, 4, 5]
    assert work() == 5
    default = acme.get("/adapters/pirate/aliases/default")
    assert default["generation"] == 1, "the first ready version sets it, once"


def test_a_secret_set_by_many_at_once_is_set_by_all(acme: Pusher) -> None:
    answers = at_once(6, lambda number: acme.call("PUT", "/secrets/token", json={"value": f"value-{number}"}).status_code)
    assert Counter(answers) == {201: 1, 200: 5}


def test_an_alias_moves_once_from_each_state(acme: Pusher, work: Callable[[], int]) -> None:
    for seed in range(3):
        acme.push("pirate", pushing.adapter(seed))
    assert work() == 3
    new = at_once(5, lambda number: acme.put_alias("pirate", "prod", 1 + number % 3, **{"If-None-Match": "*"}).status_code)
    assert Counter(new) == {201: 1, 412: 4}
    current = acme.get("/adapters/pirate/aliases/prod")["version"]
    others = [number for number in (1, 2, 3) if number != current]
    moved = at_once(6, lambda number: acme.put_alias("pirate", "prod", others[number % 2], **{"If-Match": '"1"'}).status_code)
    assert Counter(moved) == {200: 1, 412: 5}
    assert len(acme.get("/adapters/pirate/aliases/prod/history")["items"]) == 2


def test_tenants_made_at_the_same_moment_are_a_conflict(client: TestClient, admin_token: str) -> None:
    answers = at_once(6, lambda _: client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token)).status_code)
    assert Counter(answers) == {201: 1, 409: 5}


def test_two_tenants_that_work_at_once_stay_apart(acme: Pusher, globex: Pusher, work: Callable[[], int]) -> None:
    """The same name and the same bytes, through one pool of connections."""
    made = pushing.adapter(1)
    answers = at_once(6, lambda number: (acme, globex)[number % 2].push("pirate", made).status_code)
    assert Counter(answers) == {201: 2, 200: 4}
    assert work() == 2
    seen = at_once(8, lambda number: [row["name"] for row in (acme, globex)[number % 2].get("/adapters")["items"]])
    assert seen == [["pirate"]] * 8
    assert acme.call("DELETE", "/adapters/pirate").status_code == 204
    assert acme.get("/adapters")["items"] == []
    assert [row["name"] for row in globex.get("/adapters")["items"]] == ["pirate"]
