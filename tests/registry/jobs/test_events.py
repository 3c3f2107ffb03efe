"""Events of jobs: a cursor to poll with, a stream to follow, and five hundred watchers that cost next to nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from registry.db import Database
from registry.jobs import service
from registry.jobs.service import Claim
from tests.registry.conftest import MakeTenant, bearer

Enqueue = Callable[[str], str]


@pytest.fixture
def enqueue(database: Database, subject_of: Callable) -> Enqueue:
    def enqueue(token: str) -> str:
        with database.write() as session:
            return service.enqueue(session, kind="work", tenant_id=subject_of(token).tenant_id, subject_id="key", payload={}).id

    return enqueue


def claim(database: Database) -> Claim:
    with database.write() as session:
        taken = service.claim(session, owner="one", kinds=["work"], lease_s=60)
    assert taken is not None
    return taken


def act(database: Database, verb: Callable, *values: object) -> None:
    with database.write() as session:
        verb(session, *values)


def test_polling_by_cursor(client: TestClient, make_tenant: MakeTenant, enqueue: Enqueue, database: Database) -> None:
    token = make_tenant("acme")
    route = f"/api/v1/jobs/{enqueue(token)}/events"
    first = client.get(route, headers=bearer(token)).json()
    assert [(event["number"], event["type"], event["state"]) for event in first["items"]] == [(1, "state", "queued")]
    assert (first["after"], first["ended"]) == (1, False)
    taken = claim(database)
    act(database, service.progress, taken, {"done": 1, "of": 2})
    act(database, service.finish, taken, {"answer": 42})
    second = client.get(route, params={"after": 1, "limit": 2}, headers=bearer(token)).json()
    assert [(event["number"], event["type"], event["data"]) for event in second["items"]] == [
        (2, "state", None),
        (3, "progress", {"done": 1, "of": 2}),
    ]
    assert not second["ended"]
    third = client.get(route, params={"after": second["after"]}, headers=bearer(token)).json()
    assert [(event["state"], event["data"]) for event in third["items"]] == [("succeeded", {"result": {"answer": 42}})]
    assert third["ended"]
    assert client.get(route, params={"after": third["after"]}, headers=bearer(token)).json() == {"items": [], "after": 4, "ended": True}


def test_refusals(client: TestClient, make_tenant: MakeTenant, enqueue: Enqueue) -> None:
    mine, theirs = make_tenant("acme"), make_tenant("globex")
    job_id = enqueue(theirs)
    for headers in (bearer(mine), bearer(mine) | {"Accept": "text/event-stream"}):
        assert client.get(f"/api/v1/jobs/{job_id}/events", headers=headers).status_code == 404
    refused = client.get(f"/api/v1/jobs/{job_id}/events", headers=bearer(theirs) | {"Last-Event-ID": "x"})
    assert (refused.status_code, refused.json()["field"]) == (400, "Last-Event-ID")
    assert client.get(f"/api/v1/jobs/{job_id}/events", headers=bearer(make_tenant("other", "inference"))).status_code == 403


@contextmanager
def following(url: str, token: str, job_id: str, **headers: str) -> Iterator[Iterator[dict]]:
    """The events of a stream as they come."""
    headers = bearer(token) | {"Accept": "text/event-stream"} | headers
    with httpx2.stream("GET", f"{url}/api/v1/jobs/{job_id}/events", headers=headers, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), response.read()
        yield (json.loads(line.removeprefix("data:")) for line in response.iter_lines() if line.startswith("data:"))


def test_a_stream_tells_what_happens_and_ends_with_the_job(
    server_url: str, make_tenant: MakeTenant, enqueue: Enqueue, database: Database, *, app: FastAPI
) -> None:
    token = make_tenant("acme")
    job_id = enqueue(token)
    with following(server_url, token, job_id) as events:
        assert next(events)["state"] == "queued"
        taken = claim(database)
        assert next(events)["state"] == "running"
        act(database, service.progress, taken, {"done": 1})
        assert next(events)["data"] == {"done": 1}
        act(database, service.finish, taken, {})
        assert [event["state"] for event in events] == ["succeeded"]
    with following(server_url, token, job_id, **{"Last-Event-ID": "2"}) as events:
        assert [event["number"] for event in events] == [3, 4]
    gone = httpx2.get(
        f"{server_url}/api/v1/jobs/{job_id}/events", headers=bearer(token) | {"Accept": "text/event-stream", "Last-Event-ID": "4"}
    )
    assert gone.status_code == 204, "a follower of a job that is over need not come back"
    assert app.state.job_watch.num_watchers == 0


def test_a_reader_that_leaves_is_forgotten_and_a_draining_process_lets_go(
    server_url: str, make_tenant: MakeTenant, enqueue: Enqueue, *, app: FastAPI
) -> None:
    token = make_tenant("acme")
    job_id = enqueue(token)
    with following(server_url, token, job_id) as events:
        next(events)
    deadline = time.monotonic() + 15
    while app.state.job_watch.num_watchers:
        assert time.monotonic() < deadline, "a watcher without a reader stays"
        time.sleep(0.05)
    with following(server_url, token, job_id) as events:
        next(events)
        app.state.job_watch.close()
        assert list(events) == []
    full = httpx2.get(f"{server_url}/api/v1/jobs/{job_id}/events", headers=bearer(token) | {"Accept": "text/event-stream"})
    assert (full.status_code, "retry-after" in full.headers) == (503, True)


def _p99_s(url: str, token: str) -> float:
    with httpx2.Client(headers=bearer(token), timeout=30) as client:
        times = []
        for _ in range(200):
            began = time.perf_counter()
            assert client.get(f"{url}/api/v1/jobs").status_code == 200
            times.append(time.perf_counter() - began)
    return sorted(times)[int(len(times) * 0.99)]


@contextmanager
def watchers(count: int, url: str, token: str, *, enqueue: Enqueue, app: FastAPI) -> Iterator[None]:
    """So many open streams, each of a job of its own in which nothing happens."""
    address, before = urlsplit(url), app.state.job_watch.num_watchers
    with ExitStack() as open_streams:
        for job_id in [enqueue(token) for _ in range(count)]:
            stream = open_streams.enter_context(socket.create_connection((address.hostname, address.port), timeout=30))
            head = f"GET /api/v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            head += "Accept: text/event-stream\r\n\r\n"
            stream.sendall(head.encode())
            assert b"200" in stream.recv(15)
        at_least, deadline = before + count, time.monotonic() + 15
        while app.state.job_watch.num_watchers < at_least:
            assert time.monotonic() < deadline, f"{app.state.job_watch.num_watchers} watch"
            time.sleep(0.05)
        yield


def _in_use(database: Database) -> int:
    return sum(engine.pool.checkedout() for engine in {database.engine, database.system_engine})  # type: ignore[attr-defined]


def test_watchers_hold_no_session_and_no_thread(server_url: str, make_tenant: MakeTenant, enqueue: Enqueue, *, app: FastAPI) -> None:
    """The pool has 20 connections and the server 40 threads; the poller looks for all of them with one."""
    token = make_tenant("acme")
    with watchers(5, server_url, token, enqueue=enqueue, app=app):
        few = threading.active_count()
        with watchers(100, server_url, token, enqueue=enqueue, app=app):
            assert threading.active_count() - few <= 40, "no more than the threads that the requests themselves took"
            assert _in_use(app.state.database) <= 2, "the poller, and who writes when keys were last used"


@pytest.mark.full
def test_five_hundred_idle_watchers_leave_listing_within_twice_its_p99(
    server_url: str, make_tenant: MakeTenant, enqueue: Enqueue, *, app: FastAPI
) -> None:
    token = make_tenant("acme")
    _p99_s(server_url, token)
    alone_s = min(_p99_s(server_url, token) for _ in range(3))
    num_threads = threading.active_count()
    with watchers(500, server_url, token, enqueue=enqueue, app=app):
        assert threading.active_count() - num_threads <= 40
        assert _in_use(app.state.database) <= 2, "the poller, and who writes when keys were last used"
        watched_s = min(_p99_s(server_url, token) for _ in range(3))
    assert watched_s <= 2 * alone_s, f"{watched_s / alone_s:.2f} times the p99 without watchers"
