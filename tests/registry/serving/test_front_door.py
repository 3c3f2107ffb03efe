"""What a request meets at the front door: authorisation, choice, grant, relay; and what it leaves when it fails."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gpu_runtime.server.grants import GrantVerifier
from registry.wire import FORM_DIGEST_HEADER, GRANT_HEADER, REQUEST_ID_HEADER, VERSION_DIGEST_HEADER
from tests.registry.serving.conftest import World, closed_port_url, make_replica, make_world, resident, serving, wait_for
from tests.registry.serving.fake_replica import EVENTS, FakeReplica, fake_replica


@pytest.fixture(scope="module")
def one_replica() -> Iterator[FakeReplica]:
    with fake_replica() as made:
        yield made


@pytest.fixture
def replica(one_replica: FakeReplica) -> FakeReplica:
    one_replica.forget()
    return one_replica


@pytest.fixture
def ready(world: World, served: httpx2.Client, replica: FakeReplica) -> str:
    """The id of `replica`, live."""
    return make_replica(served, world, url=replica.url)


def complete(http: httpx2.Client, world: World, *, key: str = "acme", model: str = "pirate", **body: Any) -> httpx2.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "x", **body}, headers=world.bearer(key))


def error_of(answer: httpx2.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["type"], error["code"]


# ---- what reaches the replica, and what comes back ----


def test_the_replica_gets_the_body_and_a_grant_that_it_believes(
    world: World, served: httpx2.Client, replica: FakeReplica, ready: str
) -> None:
    pushed = world.push("acme", "pirate")
    answer = complete(served, world, max_tokens=3)
    assert (answer.status_code, answer.json()) == (200, {"status": 200})
    path, headers, body = replica.requests[0]
    assert (path, body) == ("/v1/completions", {"model": "pirate", "prompt": "x", "max_tokens": 3})
    claims = GrantVerifier(ready, world.signer.public_keys).verify(headers[GRANT_HEADER.lower()])
    assert (claims.tenant, claims.model) == (pushed.tenant_id, "pirate")
    assert (claims.version_digest, claims.form_digest) == (pushed.version_digest, pushed.form_digest)
    assert claims.jti == headers[REQUEST_ID_HEADER.lower()] == answer.headers[REQUEST_ID_HEADER]
    assert claims.exp - claims.iat == 30
    assert claims.max_tokens == world.settings.max_request_tokens
    assert answer.headers[VERSION_DIGEST_HEADER] == pushed.version_digest
    assert answer.headers[FORM_DIGEST_HEADER] == pushed.form_digest


def test_chat_and_the_base_model(world: World, served: httpx2.Client, replica: FakeReplica, ready: str) -> None:
    answer = served.post("/v1/chat/completions", json={"model": "tiny", "messages": []}, headers=world.bearer("acme"))
    assert answer.status_code == 200
    assert not {VERSION_DIGEST_HEADER.lower(), FORM_DIGEST_HEADER.lower()} & set(answer.headers)
    path, headers, _ = replica.requests[0]
    claims = GrantVerifier(ready, world.signer.public_keys).verify(headers[GRANT_HEADER.lower()])
    assert (path, claims.form_digest, claims.version_digest) == ("/v1/chat/completions", None, None)


def test_only_listed_headers_pass_either_way(world: World, served: httpx2.Client, replica: FakeReplica, ready: str) -> None:
    world.push("acme", "pirate")
    hostile = {
        GRANT_HEADER: "forged", "X-Request-Id": "chosen", "Cookie": "c=1", "X-Forwarded-For": "1.2.3.4",
        "Connection": "X-Drop", "X-Drop": "1", "X-Lorary-Deadline-Ms": "900", "Te": "trailers",
    }  # fmt: skip
    answer = served.post("/v1/completions", json={"model": "pirate"}, headers=hostile | world.bearer("acme"))
    _, headers, _ = replica.requests[0]
    assert set(headers) <= {
        "host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length",
        "x-lorary-grant", "x-request-id", "x-lorary-deadline-ms",
    }  # fmt: skip
    assert headers["x-lorary-grant"] != "forged"
    assert headers["x-request-id"] != "chosen"
    assert headers["x-lorary-deadline-ms"] == "900"
    assert "x-drop" not in headers["connection"].lower()
    assert "x-secret" not in answer.headers
    assert answer.headers["retry-after"] == "7"


def test_references_by_number_and_alias(world: World, served: httpx2.Client, replica: FakeReplica, ready: str) -> None:
    one, two = world.push("acme", "pirate"), world.push("acme", "pirate", number=2, alias="canary")
    wanted = {"pirate": one, "pirate@1": one, "pirate@2": two, "pirate@canary": two, "pirate@default": one}
    for model, pushed in wanted.items():
        assert complete(served, world, model=model).headers[VERSION_DIGEST_HEADER] == pushed.version_digest, model


def test_a_stream_comes_event_by_event(world: World, served: httpx2.Client, replica: FakeReplica, ready: str) -> None:
    world.push("acme", "pirate")
    asked = {"model": "pirate", "behave": "stream"}
    with served.stream("POST", "/v1/completions", json=asked, headers=world.bearer("acme")) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert VERSION_DIGEST_HEADER in answer.headers
        chunks = answer.iter_raw()
        assert next(chunks) == EVENTS[0], "the first event must arrive while the replica still waits"
        replica.go.set()
        assert b"".join(chunks) == EVENTS[1] + EVENTS[2]


def test_the_replicas_own_refusals_pass_through(world: World, served: httpx2.Client, ready: str) -> None:
    world.push("acme", "pirate")
    assert complete(served, world, behave="bad_request").status_code == 400


# ---- clients that leave ----


@pytest.mark.parametrize("behave", ["stream", "think"])
def test_a_client_that_leaves_stops_the_replica(world: World, served: httpx2.Client, replica: FakeReplica, ready: str, behave: str) -> None:
    world.push("acme", "pirate")
    asked = json.dumps({"model": "pirate", "behave": behave}).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {world.keys['acme']}",
        f"Content-Length: {len(asked)}",
        "",
        "",
    )
    head = "\r\n".join(lines)
    with socket.create_connection((served.base_url.host, served.base_url.port)) as connection:
        connection.sendall(head.encode() + asked)
        wait_for(lambda: replica.requests)
        if behave == "stream":
            assert b"200 OK" in connection.recv(65536)
    assert replica.cancelled.wait(5), "the replica went on generating for nobody"


# ---- replicas that fail ----


def test_a_stream_that_breaks_ends_with_an_error_event(world: World, served: httpx2.Client, ready: str) -> None:
    world.push("acme", "pirate")
    answer = complete(served, world, behave="break")
    first, last, rest = answer.content.split(b"\n\n")
    assert (first + b"\n\n", rest) == (EVENTS[0], b"")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "replica_failed")


def test_openais_client_raises_on_that_event(world: World, served: httpx2.Client, ready: str) -> None:
    world.push("acme", "pirate")
    client = openai.OpenAI(base_url=str(served.base_url.join("/v1")), api_key=world.keys["acme"], max_retries=0)
    stream = client.completions.create(model="pirate", prompt="x", stream=True, extra_body={"behave": "break"})
    with pytest.raises(openai.APIError, match="replica that was answering failed"):
        list(stream)
    client.close()


@pytest.mark.parametrize("behave", ["break_whole", "die", "refuse_grant"])
def test_a_replica_that_fails_without_a_stream_is_a_503(
    world: World, served: httpx2.Client, replica: FakeReplica, ready: str, behave: str
) -> None:
    world.push("acme", "pirate")
    answer = complete(served, world, behave=behave)
    assert error_of(answer) == (503, "server_error", "replica_failed")
    assert answer.headers["retry-after"] == "2"
    assert len(replica.requests) == 1, "what a replica may have begun is never sent twice"


def test_a_replica_that_cannot_be_reached_is_passed_over_once(world: World, served: httpx2.Client, replica: FakeReplica) -> None:
    pushed = world.push("acme", "pirate")
    make_replica(served, world, url=closed_port_url(), residents=[resident(pushed)])
    make_replica(served, world, url=replica.url, num_queued=5)
    assert complete(served, world).status_code == 200
    assert len(replica.requests) == 1


def test_two_replicas_that_cannot_be_reached_are_enough(world: World, served: httpx2.Client, replica: FakeReplica) -> None:
    for _ in range(2):
        make_replica(served, world, url=closed_port_url())
    make_replica(served, world, url=replica.url, num_queued=5)
    answer = complete(served, world, model="tiny")
    assert error_of(answer) == (503, "server_error", "no_replica")
    assert replica.requests == []


def test_a_busy_replica_is_passed_over_and_its_answer_kept(world: World, served: httpx2.Client, replica: FakeReplica) -> None:
    with fake_replica() as other:
        make_replica(served, world, url=replica.url)
        assert complete(served, world, model="tiny", behave="busy").json() == {"status": 503}
        make_replica(served, world, url=other.url, num_queued=5)
        assert complete(served, world, model="tiny", behave="busy").headers["retry-after"] == "7"
    assert (len(replica.requests), len(other.requests)) == (2, 1)


def test_without_a_live_replica_the_answer_is_503_and_when_to_come_back(world: World, served: httpx2.Client) -> None:
    world.push("acme", "pirate")
    answer = complete(served, world)
    assert error_of(answer) == (503, "server_error", "no_replica")
    assert answer.headers["retry-after"] == "2"


def test_a_request_waits_a_little_for_a_replica(tmp_path: Path, replica: FakeReplica) -> None:
    from concurrent.futures import ThreadPoolExecutor

    world = make_world(tmp_path, replica_wait_s=10.0)
    with serving(world.app) as url, httpx2.Client(base_url=url, trust_env=False) as http, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, http, world, model="tiny")
        make_replica(http, world, url=replica.url)
        assert waiting.result(timeout=10).status_code == 200


def test_what_is_deleted_while_a_request_waits_is_not_served(tmp_path: Path, replica: FakeReplica) -> None:
    import time
    from concurrent.futures import ThreadPoolExecutor

    world = make_world(tmp_path, replica_wait_s=10.0)
    world.push("acme", "pirate")
    with serving(world.app) as url, httpx2.Client(base_url=url, trust_env=False) as http, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, http, world)
        time.sleep(0.3)
        world.execute("UPDATE adapters SET deleted_at = '2026-01-01 00:00:00.000000'")
        make_replica(http, world, url=replica.url)
        assert waiting.result(timeout=10).status_code == 404
    assert replica.requests == []


# ---- who may ----


def test_unreachable_models_look_all_alike(world: World, served: httpx2.Client, replica: FakeReplica, ready: str) -> None:
    world.push("rival", "theirs")
    world.push("acme", "coming", status="pending")
    world.push("acme", "refused", status="rejected")
    gone = world.push("acme", "gone")
    world.execute("UPDATE adapters SET deleted_at = '2026-01-01 00:00:00.000000' WHERE id = :i", i=gone.adapter_id)
    world.push("acme", "plain", alias=None)
    world.add_base_model("unready", digest="d" * 64, status="pending")
    bodies = set()
    models = [
        "absent",
        "theirs",
        "theirs@1",
        "coming",
        "coming@1",
        "refused@1",
        "gone",
        "gone@1",
        "plain",
        "plain@7",
        "plain@no",
        "unready",
    ]
    for model in [*models, "tiny@1", "tiny@default", "Not A Name", "a@b@c", "x" * 300, "../etc"]:
        answer = complete(served, world, model=model)
        assert error_of(answer) == (404, "invalid_request_error", "model_not_found"), model
        assert answer.json()["error"]["param"] == "model"
        bodies.add(answer.text.replace(model[:200], "M"))
    assert len(bodies) == 1
    assert replica.requests == []


@pytest.mark.parametrize(
    "undo",
    [
        "UPDATE api_keys SET revoked_at = '2026-01-01 00:00:00.000000' WHERE name = 'acme'",
        "UPDATE api_keys SET expires_at = '2026-01-01 00:00:00.000000' WHERE name = 'acme'",
        "UPDATE tenants SET deleted_at = '2026-01-01 00:00:00.000000' WHERE name = 'acme'",
        "UPDATE adapters SET deleted_at = '2026-01-01 00:00:00.000000'",
        "UPDATE adapter_versions SET status = 'deleted'",
        "DELETE FROM aliases",
    ],
)
def test_what_is_taken_away_stops_at_once_even_when_resident(world: World, served: httpx2.Client, replica: FakeReplica, undo: str) -> None:
    pushed = world.push("acme", "pirate")
    make_replica(served, world, url=replica.url, residents=[resident(pushed)])
    assert complete(served, world).status_code == 200
    world.execute(undo)
    assert complete(served, world).status_code in (401, 404)
    assert len(replica.requests) == 1


def test_keys_without_the_scope_and_strangers_are_refused(world: World, served: httpx2.Client, replica: FakeReplica, ready: str) -> None:
    world.push("acme", "pirate")
    world.add_key("reader", tenant="acme", scopes=["adapters:read"])
    assert error_of(complete(served, world, key="reader"))[0] == 403
    assert error_of(served.post("/v1/completions", json={"model": "pirate"}))[0] == 401
    assert error_of(served.post("/v1/completions", json={"model": "pirate"}, headers={"Authorization": "Bearer lry_x"}))[0] == 401
    assert error_of(complete(served, world, key="admin")) == (400, "invalid_request_error", "bad_request")
    answer = served.post("/v1/completions", json={"model": "pirate"}, headers=world.bearer("admin") | {"X-Lorary-Tenant": "acme"})
    assert answer.status_code == 200
    assert (
        served.post("/v1/completions", json={"model": "pirate"}, headers=world.bearer("rival") | {"X-Lorary-Tenant": "acme"}).status_code
        == 403
    )


@pytest.mark.parametrize(
    ("body", "code"), [(b"{", "invalid_json"), (b"[" * 100_000, "invalid_json"), (b"[]", "invalid_json"),
                       (b'{"model": "a", "model": "b"}', "duplicate_key"), (b'{"model": "a\\ud800"}', "invalid_json"),
                       (b"{}", "missing_model"),
                       (b'{"model": 3}', "missing_model"), (b'{"model": ""}', "missing_model"), (b"\xff", "invalid_json")]
)  # fmt: skip
def test_unreadable_requests_are_400_in_openais_shape(world: World, served: httpx2.Client, body: bytes, code: str) -> None:
    answer = served.post("/v1/completions", content=body, headers=world.bearer("acme"))
    assert error_of(answer) == (400, "invalid_request_error", code)


def test_bodies_are_bounded_with_and_without_a_declared_length(tmp_path: Path, replica: FakeReplica) -> None:
    world = make_world(tmp_path, max_body_bytes=5000)
    with serving(world.app) as url, httpx2.Client(base_url=url, trust_env=False) as http:
        make_replica(http, world, url=replica.url)
        assert error_of(complete(http, world, model="tiny", pad="x" * 5000))[0] == 413
        chunked = (b"x" * 1000 for _ in range(8))
        assert error_of(http.post("/v1/completions", content=chunked, headers=world.bearer("acme")))[0] == 413
        assert complete(http, world, model="tiny").status_code == 200
    assert len(replica.requests) == 1


# ---- the database goes away ----


@pytest.mark.sqlite
def test_without_the_database_new_requests_get_503_and_running_ones_finish(
    world: World, served: httpx2.Client, replica: FakeReplica, ready: str
) -> None:
    world.push("acme", "pirate")
    asked = {"model": "pirate", "behave": "stream"}
    with served.stream("POST", "/v1/completions", json=asked, headers=world.bearer("acme")) as running:
        chunks = running.iter_raw()
        assert next(chunks) == EVENTS[0]
        for table in ("api_keys", "replicas"):
            world.execute(f"ALTER TABLE {table} RENAME TO {table}_away")
        refused = complete(served, world)
        assert error_of(refused)[:2] == (503, "server_error")
        assert int(refused.headers["retry-after"]) >= 1
        replica.go.set()
        assert b"".join(chunks) == EVENTS[1] + EVENTS[2]
    assert len(replica.requests) == 1
