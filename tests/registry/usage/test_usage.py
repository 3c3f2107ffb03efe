"""Replicas' reports are settled once, for their own grants alone, and answer `/usage` exactly."""

from __future__ import annotations

import csv
import datetime as dt
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient

from registry.db import database_time
from registry.quotas import rates, repository
from registry.quotas.rates import RateLimits
from registry.serving.grants import GrantSigner
from registry.usage.models import UsageDay, UsageRecord
from registry.wire import WIRE_VERSION, GrantClaims
from tests.registry.quotas.test_rates import wait_for_room
from tests.registry.serving.conftest import World, make_replica, make_world

_numbers = count()


@pytest.fixture
def world(tmp_path: Path, database_urls: dict[str, Any]) -> Iterator[World]:
    made = make_world(tmp_path, **database_urls)
    made.add_key("reader", tenant="acme", scopes=["usage:read"])
    made.add_key("rivals", tenant="rival", scopes=["usage:read"])
    yield made
    made.database.close()
    made.app.state.database.close()


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with TestClient(world.app) as made:
        yield made


@pytest.fixture
def replica_id(client: TestClient, world: World) -> str:
    return make_replica(client, world)


def claims(world: World, replica_id: str, **changes: Any) -> GrantClaims:
    now = int(time.time())
    values = {"aud": replica_id, "jti": f"request-{next(_numbers)}", "iat": now, "exp": now + 30, "tenant": world.tenants["acme"]}
    values |= {"model": "pirate", "form_digest": "f" * 64, "version_digest": "a" * 64, "max_tokens": 9, "key_id": "one"}
    return GrantClaims.model_validate(values | changes)


def ended(world: World, granted: GrantClaims, prompt: int = 10, completion: int = 5, **changes: Any) -> dict[str, Any]:
    values = {"grant": world.signer.sign(granted), "outcome": "finished", "age_s": 0.5}
    return values | {"num_prompt_tokens": prompt, "num_completion_tokens": completion} | changes


def report(client: TestClient, world: World, replica_id: str, *requests: dict[str, Any], key: str = "replica") -> Any:
    body = {"wire_version": WIRE_VERSION, "requests": list(requests)}
    return client.post(f"/api/v1/replicas/{replica_id}/usage", json=body, headers=world.bearer(key))


def counted(answer: Any) -> tuple[int, int, int]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["num_counted"], body["num_known"], body["num_refused"]


def usage(client: TestClient, world: World, key: str = "reader", **params: Any) -> list[dict[str, Any]]:
    answer = client.get("/api/v1/usage", params=params, headers=world.bearer(key))
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


def sums(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in ("requests", "cancelled", "failed", "prompt_tokens", "completion_tokens"))


@pytest.mark.postgresql
def test_requests_of_every_outcome_add_up(world: World, client: TestClient, replica_id: str) -> None:
    answer = report(
        client,
        world,
        replica_id,
        ended(world, claims(world, replica_id)),
        ended(world, claims(world, replica_id, model="pirate@3"), 1, 2),
        ended(world, claims(world, replica_id, model="pirate@prod"), 3, 4, outcome="cancelled"),
        ended(world, claims(world, replica_id), 0, 0, outcome="failed"),
        ended(world, claims(world, replica_id, key_id="two"), 100, 0),
        ended(world, claims(world, replica_id, model="tiny", form_digest=None, version_digest=None), 7, 7),
        ended(world, claims(world, replica_id, tenant=world.tenants["rival"]), 1000, 1000),
    )
    assert counted(answer) == (7, 0, 0)
    found = {(row["adapter"], row["base_model"], row["key_id"]): sums(row) for row in usage(client, world)}
    assert found == {
        ("pirate", None, "one"): (4, 1, 1, 14, 11),
        ("pirate", None, "two"): (1, 0, 0, 100, 0),
        (None, "tiny", "one"): (1, 0, 0, 7, 7),
    }
    (total,) = usage(client, world, group_by="tenant")
    assert (sums(total), total["tenant"], total["day"], total["adapter"], total["key_id"]) == ((6, 1, 1, 121, 18), "acme", None, None, None)
    assert [sums(row) for row in usage(client, world, adapter="tiny")] == [(1, 0, 0, 7, 7)]
    assert [sums(row) for row in usage(client, world, key_id="two")] == [(1, 0, 0, 100, 0)]
    assert [sums(row) for row in usage(client, world, "rivals")] == [(1, 0, 0, 1000, 1000)]
    assert {row["tenant"] for row in usage(client, world, "admin", group_by="tenant")} == {"acme", "rival"}


@pytest.mark.postgresql
def test_a_report_that_comes_again_counts_nothing_twice(world: World, client: TestClient, replica_id: str) -> None:
    first, second = (ended(world, claims(world, replica_id)) for _ in range(2))
    assert counted(report(client, world, replica_id, first)) == (1, 0, 0)
    assert counted(report(client, world, replica_id, first, second)) == (1, 1, 0)
    assert counted(report(client, world, replica_id, second, second | {"num_prompt_tokens": 99})) == (0, 1, 1)
    assert [sums(row) for row in usage(client, world)] == [(2, 0, 0, 20, 10)]


@pytest.mark.postgresql
def test_the_same_report_many_times_at_once(world: World, client: TestClient, replica_id: str) -> None:
    same = [ended(world, claims(world, replica_id)) for _ in range(20)]
    own = [[ended(world, claims(world, replica_id))] for _ in range(6)]
    start = threading.Barrier(6)

    def send(number: int) -> tuple[int, int, int]:
        start.wait()
        return counted(report(client, world, replica_id, *(same if number % 2 else reversed(same)), *own[number]))

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, range(6)))
    assert sum(answer[0] for answer in answers) == 26
    assert [sums(row) for row in usage(client, world)] == [(26, 0, 0, 260, 130)]


def test_only_grants_of_ours_for_this_replica_are_settled(world: World, client: TestClient, replica_id: str) -> None:
    world.add_key("replica-2", tenant=None, scopes=["replica"])
    other = make_replica(client, world, url="http://127.0.0.1:10", key="replica-2")
    now = int(time.time())
    forged = GrantSigner("another secret, which is long enough").sign(claims(world, replica_id))
    old = claims(world, replica_id, iat=now - 100_000, exp=now - 99_970)
    answer = report(
        client,
        world,
        replica_id,
        ended(world, claims(world, other)),
        ended(world, claims(world, replica_id)) | {"grant": forged},
        ended(world, claims(world, replica_id)) | {"grant": "no grant"},
        ended(world, old),
        ended(world, claims(world, replica_id), age_s=90_000),
    )
    assert counted(answer) == (0, 0, 5)
    assert counted(report(client, world, replica_id, ended(world, claims(world, "forgotten-id")))) == (1, 0, 0), (
        "held, so it was sent to it"
    )
    assert report(client, world, replica_id, ended(world, claims(world, replica_id)), key="replica-2").status_code == 404
    assert report(client, world, replica_id, ended(world, claims(world, replica_id)), key="admin").status_code == 403
    assert report(client, world, "0" * 32, ended(world, claims(world, replica_id))).status_code == 404
    assert report(client, world, replica_id).status_code == 422, "an empty report"
    assert [sums(row) for row in usage(client, world)] == [(1, 0, 0, 10, 5)]


@pytest.mark.postgresql
def test_settling_gives_back_what_was_reserved_too_much(world: World, client: TestClient, replica_id: str) -> None:
    tenant_id = world.tenants["acme"]
    limits = RateLimits(requests=None, tokens=1000)
    wait_for_room(world.database)
    with world.database.write() as session:
        held = [rates.reserve(session, tenant_id, limits, tokens=300) for _ in range(3)]
    granted = [claims(world, replica_id, minute=one.minute, reserved_tokens=300) for one in held]
    report(client, world, replica_id, *(ended(world, one) for one in granted[:2]))
    report(client, world, replica_id, ended(world, granted[0]), ended(world, granted[2], 400, 0))
    with world.database.read() as session:
        row = session.scalars(select(repository.RateWindow)).one()
        assert (row.minute, row.tokens) == (held[0].minute, 15 + 15 + 400)


def test_the_day_is_the_databases_and_old_records_go(world: World, client: TestClient, replica_id: str) -> None:
    report(client, world, replica_id, ended(world, claims(world, replica_id), age_s=86_000), ended(world, claims(world, replica_id)))
    with world.database.write() as session:
        now = database_time(session)
        days = set(session.scalars(select(UsageDay.day)))
        session.execute(update(UsageRecord).values(settled_at=now - dt.timedelta(days=3)))
    assert days <= {now.date(), (now - dt.timedelta(seconds=86_000)).date(), (now - dt.timedelta(seconds=86_010)).date()}
    report(client, world, replica_id, ended(world, claims(world, replica_id)))
    with world.database.read() as session:
        assert len(session.scalars(select(UsageRecord)).all()) == 1
    assert sum(row["requests"] for row in usage(client, world)) == 3


@pytest.mark.postgresql
def test_pages_and_csv_tell_the_same(world: World, client: TestClient, replica_id: str) -> None:
    days = [dt.date(2026, 3, day) for day in (1, 2, 3)]
    for day in days:
        for model in ("pirate", "tiny", "zeta"):
            for key in ("a", "B", "c"):
                values = {"requests": 1, "cancelled": 0, "failed": 0, "prompt_tokens": day.day, "completion_tokens": 2}
                world.add(UsageDay(tenant_id=world.tenants["acme"], day=day, model=model, key_id=key, is_adapter=model != "tiny", **values))
    for groups in (["day", "adapter", "key"], ["day"], ["adapter", "key"], ["key"], ["tenant"]):
        asked = {"since": "2026-03-01", "until": "2026-03-03", "group_by": groups}
        pages, cursor = [], None
        while True:
            params = asked | {"limit": 4} | ({"cursor": cursor} if cursor else {})
            page = client.get("/api/v1/usage", params=params, headers=world.bearer("reader")).json()
            pages += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        text = client.get("/api/v1/usage", params=asked, headers=world.bearer("reader") | {"Accept": "text/csv"})
        assert text.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(text.text)))
        assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in pages] == rows
        assert sum(row["requests"] for row in pages) == 27
        assert sum(row["prompt_tokens"] for row in pages) == 9 * 6
    assert [row["day"] for row in usage(client, world, since="2026-03-02", until="2026-03-02", group_by="day")] == ["2026-03-02"]


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"since": "2026-03-02", "until": "2026-03-01"}, 400),
        ({"since": "2020-01-01", "until": "2026-03-01"}, 400),
        ({"since": "0001-01-01", "until": "0001-01-05"}, 200),
        ({"until": "0001-01-01"}, 200),
        ({"since": "9999-12-31", "until": "9999-12-31"}, 200),
        ({"since": "yesterday"}, 422),
        ({"group_by": "colour"}, 422),
        ({"format": "xml"}, 422),
        ({"cursor": "nonsense"}, 400),
        ({"cursor": "WyIyMDI2LTAxLTAxVDAwOjAwOjAwKzAwOjAwIiwgIngiXQ"}, 400),
        ({"adapter": "a\0b"}, 422),
    ],
)
def test_what_cannot_be_asked(world: World, client: TestClient, params: dict[str, str], status: int) -> None:
    assert client.get("/api/v1/usage", params=params, headers=world.bearer("reader")).status_code == status
