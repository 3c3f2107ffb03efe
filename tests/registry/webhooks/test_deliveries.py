"""What happens is told: signed, at least once, again after failures, never twice at a time."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from registry.config import Settings
from registry.db import Database, database_time
from registry.outbound import make_outbound_client
from registry.sealing import make_sealer
from registry.webhooks import delivery
from registry.webhooks.delivery import DeliveryLimits, Outcome, pause_s
from registry.webhooks.models import WebhookDelivery, WebhookEvent
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import bearer
from tests.registry.webhooks.conftest import Hook, subscribe
from tests.registry.webhooks.receiving import Receiver, receiver
from workers.webhooks import Deliverer, build_deliverer

Deliver = Callable[[], int]
Happen = Callable[[], None]
Log = Callable[[], list[Hook]]
Later = Callable[[float], None]


@pytest.mark.postgresql
def test_the_life_of_an_adapter_is_heard(*, client: TestClient, acme: Pusher, ears: Receiver, work: Deliver, deliver: Deliver) -> None:
    subscribe(
        client,
        acme.headers["Authorization"].removeprefix("Bearer "),
        ears,
        "version.ready",
        "version.rejected",
        "alias.moved",
        "adapter.deleted",
    )
    pushed = acme.push("pirate", adapter(1)).json()
    assert work() == 1
    acme.call("DELETE", "/adapters/pirate")
    deliver()
    assert sorted(ears.types) == ["adapter.deleted", "alias.moved", "alias.moved", "version.ready"]
    assert ears.forged == 0
    ready = next(event for event in ears.heard if event["type"] == "version.ready")
    after = ready["data"]["after"]
    assert (after["adapter"], after["number"], after["version_digest"]) == ("pirate", 1, pushed["version_digest"])
    assert dt.datetime.fromisoformat(ready["timestamp"]).tzinfo is not None
    assert len(set(ears.ids)) == 4


def test_only_what_was_asked_for_and_only_of_this_tenant(
    *, client: TestClient, token: str, ears: Receiver, acme: Pusher, happen: Happen, deliver: Deliver, database: Database
) -> None:
    subscribe(client, token, ears, "key.revoked")
    happen()
    acme.push("pirate", adapter(1))
    assert deliver() == 0
    with database.system_read() as session:
        assert session.scalar(select(func.count()).select_from(WebhookEvent)) == 0, "what nobody asked for is not kept"


def test_a_rolled_back_change_is_not_told(*, client: TestClient, token: str, hook: Hook, ears: Receiver, deliver: Deliver) -> None:
    refused = client.post("/api/v1/keys", json={"name": "k", "scopes": ["admin"]}, headers=bearer(token))
    assert refused.status_code == 422
    assert deliver() == 0


def test_a_receiver_that_is_down_and_comes_back(
    *, client: TestClient, token: str, hook: Hook, ears: Receiver, happen: Happen, deliver: Deliver, log_of: Log, later: Later
) -> None:
    ears.answers = [500, 302, 200]
    happen()
    for state in ("pending", "pending", "delivered"):
        assert deliver() == 1
        (row,) = log_of()
        assert row["state"] == state
        assert deliver() == 0, "not again before its time"
        later(60)
    assert [entry["status"] for entry in row["attempts"]] == [500, 302, 200]
    assert len(set(ears.ids)) == 1, "every attempt has the same webhook-id"
    assert ears.types == ["key.created"]
    assert row["finished_at"] is not None


def test_a_port_where_nobody_listens(*, client: TestClient, token: str, happen: Happen, deliver: Deliver) -> None:
    with receiver() as gone:
        made = subscribe(client, token, gone)
    happen()
    assert deliver() == 1
    (row,) = client.get(f"/api/v1/webhooks/{made['id']}/deliveries", headers=bearer(token)).json()["items"]
    assert (row["state"], row["attempts"][0]["error"]) == ("pending", "connect")
    assert row["next_attempt_at"] > row["attempts"][0]["at"]


def test_attempts_end_and_a_replay_begins_anew(
    *,
    client: TestClient,
    token: str,
    hook: Hook,
    ears: Receiver,
    happen: Happen,
    deliver: Deliver,
    log_of: Log,
    later: Later,
    settings: Settings,
) -> None:
    ears.answers = [500]
    happen()
    for _ in range(settings.webhook_max_attempts):
        assert deliver() == 1
        later(60)
    assert deliver() == 0
    (row,) = log_of()
    assert (row["state"], row["attempt"]) == ("failed", settings.webhook_max_attempts)
    ears.answers = [200]
    route = f"/api/v1/webhooks/{hook['id']}/deliveries/{row['id']}/replay"
    assert client.post(route, headers=bearer(token)).status_code == 202
    assert client.post(route, headers=bearer(token)).status_code == 409, "one at a time"
    assert deliver() == 1
    assert log_of()[0]["state"] == "delivered"
    assert set(ears.ids) == {row["event_id"]}


def test_410_disables_the_webhook(*, client: TestClient, token: str, hook: Hook, ears: Receiver, happen: Happen, deliver: Deliver) -> None:
    ears.answers = [410]
    happen()
    happen()
    assert deliver() == 1
    route = f"/api/v1/webhooks/{hook['id']}"
    shown = client.get(route, headers=bearer(token)).json()
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "the receiver answered 410 Gone")
    happen()
    assert client.post(f"{route}/ping", headers=bearer(token)).status_code == 409
    ears.answers = [200]
    assert client.patch(route, json={"enabled": True}, headers=bearer(token)).json()["disabled_reason"] is None
    assert deliver() == 1, "what was pending goes on; what happened meanwhile was not told"


@pytest.mark.postgresql
def test_a_worker_killed_between_send_and_mark(
    *, database: Database, settings: Settings, hook: Hook, ears: Receiver, happen: Happen, deliver: Deliver, log_of: Log, later: Later
) -> None:
    happen()
    limits = DeliveryLimits()
    with database.system_write() as session:
        claimed = delivery.claim(session, limits)
    assert claimed is not None
    outcome = delivery.send(claimed, make_outbound_client(settings), make_sealer(settings), total_s=5)
    assert outcome.delivered
    assert deliver() == 0, "its lease still holds"
    later(60)
    assert deliver() == 1
    assert len(ears.ids) == 2
    assert len(set(ears.ids)) == 1, "the receiver can tell that it is the same"
    with database.system_write() as session:
        assert delivery.keep(session, claimed, outcome, limits) is None, "a stale worker changes nothing"
    (row,) = log_of()
    assert [entry["error"] for entry in row["attempts"]] == ["worker_lost", None]


def test_workers_that_die_use_attempts_up(*, database: Database, hook: Hook, happen: Happen, log_of: Log, later: Later) -> None:
    happen()
    limits = DeliveryLimits(max_attempts=2)
    for expected in (1, 2):
        with database.system_write() as session:
            claimed = delivery.claim(session, limits)
        assert claimed is not None
        assert claimed.attempt == expected
        later(60)
    with database.system_write() as session:
        assert delivery.claim(session, limits) is None
    (row,) = log_of()
    assert row["state"] == "failed"


@pytest.mark.postgresql
def test_many_threads_deliver_each_event_once_and_one_at_a_time(
    *, settings: Settings, database: Database, hook: Hook, ears: Receiver, happen: Happen, log_of: Log
) -> None:
    for _ in range(12):
        happen()
    deliverers = [build_deliverer(settings, database) for _ in range(2)]
    stop = threading.Event()
    for one in deliverers:
        one.start(stop)
    deadline = time.monotonic() + 30
    while len(ears.heard) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    for one in deliverers:
        one.join()
    assert len(ears.ids) == len(set(ears.ids)) == 12
    assert ears.most_inside == 1
    assert {row["state"] for row in log_of()} == {"delivered"}


def test_a_slow_receiver_does_not_hold_up_another(
    *, client: TestClient, token: str, hook: Hook, ears: Receiver, happen: Happen, deliverer: Deliverer
) -> None:
    with receiver() as quick:
        subscribe(client, token, quick)
        ears.gate.clear()
        happen()
        happen()
        stop = threading.Event()
        deliverer.start(stop)
        deadline = time.monotonic() + 10
        while len(quick.heard) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(quick.heard) == 2
        assert ears.heard == []
        ears.gate.set()
        stop.set()
        deliverer.join()


def test_secrets_are_replaced_with_overlap(
    *, client: TestClient, token: str, hook: Hook, ears: Receiver, happen: Happen, deliver: Deliver, later: Later
) -> None:
    route = f"/api/v1/webhooks/{hook['id']}/rotate"
    rotated = client.post(route, json={"overlap_s": 3600}, headers=bearer(token)).json()
    assert rotated["secret"] != hook["secret"]
    for secret in (hook["secret"], rotated["secret"]):
        ears.secret = secret
        happen()
        assert deliver() == 1
    assert (len(ears.heard), ears.forged) == (2, 0)
    last = client.post(route, json={"overlap_s": 0}, headers=bearer(token)).json()
    ears.secret = rotated["secret"]
    happen()
    deliver()
    assert ears.forged == 1
    ears.secret = last["secret"]
    later(60)
    deliver()
    assert len(ears.heard) == 3


def test_a_secret_that_no_key_opens(
    *, database: Database, settings: Settings, hook: Hook, ears: Receiver, happen: Happen, log_of: Log
) -> None:
    happen()
    stranger = settings.model_copy(update={"secret_key": type(settings.secret_key)("x" * 40)})
    assert build_deliverer(stranger, database).run_one()
    assert log_of()[0]["attempts"][0]["error"] == "secret_unreadable"
    assert ears.ids == []


def test_an_address_that_turns_inward_is_refused_at_delivery(
    *, database: Database, settings: Settings, hook: Hook, ears: Receiver, happen: Happen, log_of: Log
) -> None:
    happen()
    strict = settings.model_copy(update={"outbound_allow_hosts": ()})
    assert build_deliverer(strict, database).run_one()
    assert log_of()[0]["attempts"][0]["error"] == "outbound_refused"
    assert ears.ids == []


def test_a_deleted_tenant_hears_nothing_more(
    *, client: TestClient, admin_token: str, hook: Hook, ears: Receiver, happen: Happen, deliver: Deliver
) -> None:
    happen()
    assert client.delete("/api/v1/tenants/hooked", headers=bearer(admin_token)).status_code == 204
    assert deliver() == 0


def test_pauses_grow_with_jitter_and_heed_the_receiver() -> None:
    limits = DeliveryLimits()
    failed = Outcome(500, 1)
    pauses = [pause_s(attempt, failed, limits) for attempt in range(1, 12)]
    assert all(later > 3 * earlier for earlier, later in pairwise(pauses[:6]))
    assert max(pauses) <= 12 * 3600 * 1.2
    assert len({pause_s(3, failed, limits) for _ in range(10)}) > 1
    assert pause_s(1, Outcome(429, 1, retry_after_s=900), limits) == 900
    assert pause_s(1, Outcome(429, 1, retry_after_s=1e9), limits) == 24 * 3600


@pytest.mark.parametrize(("text", "least_s", "most_s"), [("120", 100, 140), ("nonsense", 0, 10), ("-5", 0, 10), ("", 0, 10)])
def test_retry_after(
    *,
    ears: Receiver,
    happen: Happen,
    hook: Hook,
    deliver: Deliver,
    log_of: Log,
    database: Database,
    text: str,
    least_s: float,
    most_s: float,
) -> None:
    ears.answers, ears.answer_headers = [503], {"Retry-After": text}
    happen()
    deliver()
    with database.system_read() as session:
        now = database_time(session)
    wait_s = (dt.datetime.fromisoformat(log_of()[0]["next_attempt_at"]) - now).total_seconds()
    assert least_s <= wait_s <= most_s


def test_the_log_is_forgotten_in_time(
    *, settings: Settings, database: Database, client: TestClient, token: str, hook: Hook, ears: Receiver, happen: Happen, deliver: Deliver
) -> None:
    happen()
    deliver()
    ears.answers = [500]
    happen()
    deliver()
    assert build_deliverer(settings, database).purge() == 0
    time.sleep(0.01)
    assert build_deliverer(settings.model_copy(update={"webhook_retention_s": 0.001}), database).purge() == 1
    with database.system_read() as session:
        assert session.scalar(select(func.count()).select_from(WebhookDelivery)) == 1, "what is pending stays"
        assert session.scalar(select(func.count()).select_from(WebhookEvent)) == 1
