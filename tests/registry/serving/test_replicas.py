"""Registration, heartbeats, liveness, choice, drops; and who may do any of it."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from registry.serving import service
from registry.serving.names import Served
from registry.serving.repository import Address
from registry.serving.service import Authorised
from registry.wire import WIRE_VERSION
from tests.registry.serving.conftest import World, heartbeat, make_replica, registration, resident


def choose(world: World, *, tenant_id: str = "", form_digest: str | None = None, rank: int | None = None, **options: Any) -> Address | None:
    with world.database.read() as session:
        served = Served("", "tiny", None, None, None, form_digest, rank)  # type: ignore[arg-type]
        base_id = session.connection().exec_driver_sql("SELECT id FROM base_models WHERE name = 'tiny'").scalar_one()
        authorised = Authorised(tenant_id=tenant_id, model="m", served=served._replace(base_model_id=base_id))
        return service.choose_replica(session, authorised, ttl_s=options.pop("ttl_s", 15.0), **options)


def test_registration_is_idempotent_by_key_and_url(world: World, client: TestClient) -> None:
    first = client.post("/api/v1/replicas", json=registration("http://h:1/"), headers=world.bearer("replica")).json()
    again = client.post("/api/v1/replicas", json=registration("http://h:1", max_rank=8), headers=world.bearer("replica")).json()
    other = client.post("/api/v1/replicas", json=registration("http://h:2"), headers=world.bearer("replica")).json()
    world.add_key("second", tenant=None, scopes=["replica"])
    stranger = client.post("/api/v1/replicas", json=registration("http://h:1"), headers=world.bearer("second")).json()
    assert first["replica_id"] == again["replica_id"]
    assert len({first["replica_id"], other["replica_id"], stranger["replica_id"]}) == 3
    assert first["base_model"] == "tiny"
    assert first["grant_public_keys"] == list(world.signer.public_keys)
    listed = client.get("/api/v1/replicas", headers=world.bearer("admin")).json()["items"]
    assert {(row["url"], row["max_rank"], row["live"]) for row in listed} == {
        ("http://h:1", 8, False),
        ("http://h:1", 64, False),
        ("http://h:2", 64, False),
    }


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"base_digest": "c" * 64}, 422, "unknown_base_model"),
        ({"wire_version": WIRE_VERSION + 1, "new_field": True}, 409, "wire_version"),
        ({"url": "ftp://h:1"}, 422, "invalid"),
        ({"url": "http://user:pw@h:1"}, 422, "invalid"),
        ({"url": "http://h:1/path"}, 422, "invalid"),
        ({"max_rank": 0}, 422, "invalid"),
        ({"new_field": True}, 422, "invalid"),
    ],
)
def test_bad_registrations_say_why(world: World, client: TestClient, change: dict[str, Any], status: int, code: str) -> None:
    answer = client.post("/api/v1/replicas", json=registration(**change), headers=world.bearer("replica"))
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_wire_version_mismatch_names_both(world: World, client: TestClient) -> None:
    for path in ("/api/v1/replicas", "/api/v1/replicas/x/heartbeat", "/api/v1/resolve"):
        for body in ({"wire_version": 7}, {"wire_version": "1"}, {}):
            answer = client.post(path, json=body, headers=world.bearer("replica"))
            assert (answer.status_code, answer.json()["code"]) == (409, "wire_version"), answer.text
        answer = client.post(path, json={"wire_version": 7}, headers=world.bearer("replica"))
        assert "7" in answer.json()["detail"]
        assert f"speaks {WIRE_VERSION}" in answer.json()["detail"]
        assert client.post(path, content=b"{", headers=world.bearer("replica")).status_code == 422
        assert client.post(path, json=[], headers=world.bearer("replica")).json()["code"] == "invalid_json"


def test_base_models_that_are_not_ready_take_no_replicas(world: World, client: TestClient) -> None:
    world.add_base_model("coming", digest="d" * 64, status="pending")
    answer = client.post("/api/v1/replicas", json=registration(base_digest="d" * 64), headers=world.bearer("replica"))
    assert answer.json()["code"] == "unknown_base_model"


@pytest.mark.parametrize("key", ["admin", "acme"])
@pytest.mark.parametrize(
    "call",
    [
        ("POST", "/api/v1/replicas", registration()),
        ("POST", "/api/v1/replicas/x/heartbeat", heartbeat()),
        ("POST", "/api/v1/resolve", {"wire_version": WIRE_VERSION, "tenant": "t", "form_digest": "a" * 64, "grant": "g"}),
        ("GET", "/api/v1/pull/" + "a" * 64, None),
    ],
    ids=lambda call: call[1][8:16],
)
def test_only_replica_keys_do_what_replicas_do(world: World, client: TestClient, key: str, call: tuple[str, str, Any]) -> None:
    method, path, body = call
    assert client.request(method, path, json=body, headers=world.bearer(key) | {"X-Lorary-Grant": "g"}).status_code == 403
    assert client.request(method, path, json=body, headers={"X-Lorary-Grant": "g"}).status_code == 401


def test_replica_keys_do_nothing_else(world: World, client: TestClient) -> None:
    world.push("acme", "pirate")
    headers = world.bearer("replica")
    answers = [
        client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers),
        client.post("/v1/chat/completions", json={"model": "pirate", "messages": []}, headers=headers),
        client.get("/v1/models", headers=headers),
        client.get("/v1/models/tiny", headers=headers),
        client.get("/api/v1/replicas", headers=headers),
        client.get("/api/v1/adapters", headers=headers),
        client.post("/api/v1/keys", json={"name": "k", "scopes": ["replica"]}, headers=headers),
        client.post("/v1/completions", json={"model": "pirate"}, headers=headers | {"X-Lorary-Tenant": "acme"}),
    ]
    assert [answer.status_code for answer in answers] == [403] * len(answers)


def test_a_tenants_key_with_the_replica_scope_is_refused_all_the_same(world: World, client: TestClient) -> None:
    world.add_key("mixed", tenant="acme", scopes=["replica"])
    assert client.post("/api/v1/replicas", json=registration(), headers=world.bearer("mixed")).status_code == 403


def test_heartbeats_belong_to_the_key_that_registered(world: World, client: TestClient) -> None:
    replica_id = make_replica(client, world)
    world.add_key("second", tenant=None, scopes=["replica"])
    for key, target in (("second", replica_id), ("replica", "0" * 32)):
        answer = client.post(f"/api/v1/replicas/{target}/heartbeat", json=heartbeat(2), headers=world.bearer(key))
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_replica")


def test_an_older_heartbeat_changes_nothing(world: World, client: TestClient) -> None:
    pushed = world.push("acme", "pirate")
    replica_id = make_replica(client, world, sequence=10, num_queued=3, residents=[resident(pushed)])
    for stale in (10, 9):
        late = heartbeat(stale, num_queued=99, state="draining")
        assert client.post(f"/api/v1/replicas/{replica_id}/heartbeat", json=late, headers=world.bearer("replica")).status_code == 200
    row = client.get("/api/v1/replicas", headers=world.bearer("admin")).json()["items"][0]
    assert (row["num_queued"], row["state"], row["num_residents"], row["live"]) == (3, "ready", 1, True)


def test_registering_again_starts_the_report_anew(world: World, client: TestClient) -> None:
    pushed = world.push("acme", "pirate")
    replica_id = make_replica(client, world, sequence=10**12, residents=[resident(pushed)])
    client.post("/api/v1/replicas", json=registration(), headers=world.bearer("replica"))
    row = client.get("/api/v1/replicas", headers=world.bearer("admin")).json()["items"][0]
    assert (row["state"], row["num_residents"], row["live"]) == ("registered", 0, False)
    assert choose(world) is None
    client.post(f"/api/v1/replicas/{replica_id}/heartbeat", json=heartbeat(1), headers=world.bearer("replica"))
    assert choose(world) == (replica_id, "http://127.0.0.1:9")


def test_residents_follow_the_reports(world: World, client: TestClient) -> None:
    one, two = world.push("acme", "one"), world.push("rival", "two")
    replica_id = make_replica(client, world)

    def report(sequence: int, *residents: dict[str, str]) -> set[tuple[str, str]]:
        body = heartbeat(sequence, residents=list(residents))
        assert client.post(f"/api/v1/replicas/{replica_id}/heartbeat", json=body, headers=world.bearer("replica")).status_code == 200
        with world.database.read() as session:
            rows = session.connection().exec_driver_sql("SELECT form_digest, tier FROM replica_residents")
            return {(digest, tier) for digest, tier in rows}

    assert report(2, resident(one), resident(two, "disk")) == {(one.form_digest, "pool"), (two.form_digest, "disk")}
    assert report(3, resident(one, "host"), resident(two, "disk")) == {(one.form_digest, "host"), (two.form_digest, "disk")}
    assert report(4, resident(two, "pool")) == {(two.form_digest, "pool")}
    assert report(5, resident(two, "pool"), resident(two, "pool")) == {(two.form_digest, "pool")}
    assert report(6) == set()


def test_silence_and_draining_take_a_replica_out_of_choice(world: World, client: TestClient) -> None:
    replica_id = make_replica(client, world)
    assert choose(world) is not None
    world.age_heartbeats(14)
    assert choose(world) is not None
    world.age_heartbeats(16)
    assert choose(world) is None
    client.post(f"/api/v1/replicas/{replica_id}/heartbeat", json=heartbeat(2), headers=world.bearer("replica"))
    assert choose(world) is not None
    client.post(f"/api/v1/replicas/{replica_id}/heartbeat", json=heartbeat(3, state="draining"), headers=world.bearer("replica"))
    assert choose(world) is None


def test_replicas_that_went_away_are_forgotten_when_another_registers(world: World, client: TestClient) -> None:
    pushed = world.push("acme", "pirate")
    make_replica(client, world, url="http://gone:1", residents=[resident(pushed)])
    world.age_heartbeats(2 * 3600)
    make_replica(client, world, url="http://here:1")
    assert [row["url"] for row in client.get("/api/v1/replicas", headers=world.bearer("admin")).json()["items"]] == ["http://here:1"]


def test_choice_is_nearest_first_then_shortest_queue(world: World, client: TestClient) -> None:
    pushed = world.push("acme", "pirate")
    mine = {"tenant_id": pushed.tenant_id, "form_digest": pushed.form_digest, "rank": 4}
    ids = {
        "cold": make_replica(client, world, url="http://cold:1"),
        "disk": make_replica(client, world, url="http://disk:1", num_queued=1, residents=[resident(pushed, "disk")]),
        "host": make_replica(client, world, url="http://host:1", num_queued=2, residents=[resident(pushed, "host")]),
        "busy": make_replica(client, world, url="http://busy:1", num_queued=9, residents=[resident(pushed, "pool")]),
        "pool": make_replica(client, world, url="http://pool:1", num_queued=8, residents=[resident(pushed, "pool")]),
    }
    order: list[str] = []
    while (address := choose(world, **mine, tried=[ids[name] for name in order])) is not None:
        order.append(next(name for name, replica_id in ids.items() if replica_id == address.replica_id))
    assert order == ["pool", "busy", "host", "disk", "cold"]
    other_tenant = choose(world, tenant_id=world.tenants["rival"], form_digest=pushed.form_digest, rank=4)
    assert other_tenant is not None
    assert other_tenant.replica_id == ids["cold"], "another tenant's copy of the same bytes is not mine"
    assert choose(world, **(mine | {"rank": 65})) is None, "no replica serves that rank"


def test_equal_replicas_share(world: World, client: TestClient) -> None:
    ids = {make_replica(client, world, url=f"http://h{number}:1") for number in range(3)}
    assert {address.replica_id for _ in range(60) if (address := choose(world)) is not None} == ids


def test_what_is_deleted_is_dropped_until_it_is_gone(world: World, client: TestClient) -> None:
    kept, version, adapter, tenant = (world.push(*names) for names in (("acme", "k"), ("acme", "v"), ("acme", "a"), ("rival", "t")))
    unknown = {"tenant": "f" * 32, "form_digest": "e" * 64, "tier": "disk"}
    everything = [resident(pushed) for pushed in (kept, version, adapter, tenant)]
    replica_id = make_replica(client, world, residents=everything)

    def drops(sequence: int, residents: list[dict[str, str]]) -> set[str]:
        body = heartbeat(sequence, residents=residents)
        reply = client.post(f"/api/v1/replicas/{replica_id}/heartbeat", json=body, headers=world.bearer("replica"))
        return {one["form_digest"] for one in reply.json()["drop"]}

    assert drops(2, everything) == set()
    assert drops(3, [*everything, unknown]) == {unknown["form_digest"]}
    world.execute("UPDATE adapter_versions SET status = 'deleted' WHERE version_digest = :d", d=version.version_digest)
    world.execute("UPDATE adapters SET deleted_at = '2026-01-01 00:00:00.000000' WHERE id = :i", i=adapter.adapter_id)
    world.execute("UPDATE tenants SET deleted_at = '2026-01-01 00:00:00.000000' WHERE name = 'rival'")
    gone = {version.form_digest, adapter.form_digest, tenant.form_digest}
    assert drops(4, everything) == gone
    assert drops(5, everything) == gone, "it is said until it is done"
    assert drops(6, [resident(kept)]) == set()


def test_registrations_are_audited_and_listing_is_for_admins(world: World, client: TestClient) -> None:
    replica_id = make_replica(client, world)
    with world.database.read() as session:
        rows = session.connection().exec_driver_sql("SELECT action, resource_id FROM audit_events").all()
    assert ("replica.registered", replica_id) in [tuple(row) for row in rows]
    assert client.get("/api/v1/replicas", headers=world.bearer("acme")).status_code == 403
    page = client.get("/api/v1/replicas?limit=1", headers=world.bearer("admin")).json()
    assert page["next_cursor"] is None
    assert page["items"][0]["base_model"] == "tiny"
