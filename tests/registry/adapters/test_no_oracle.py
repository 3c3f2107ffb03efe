"""Another tenant's thing and one that never was cost the same work, statement for statement.

Time would be a proxy that flakes; the statements that a refusal takes are what time would show. What the answers say is
compared in `tests/e2e/test_isolation.py`, whose table this walks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from fastapi import FastAPI

from tests.e2e.test_isolation import ABSENT_DIGEST, OWNED, TABLE, World, call, visible
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.statements import recorded

pytestmark = pytest.mark.postgresql


@pytest.fixture
def theirs(acme: Pusher, globex: Pusher, work: Callable[[], int]) -> World:
    """What globex has; acme has the same kinds of things under other names."""
    acme.push("own", adapter(1))
    globex.push("veiled", adapter(2))
    work()
    files = globex.get("/adapters/veiled/versions/1")["files"]
    sha256 = next(file["sha256"] for file in files if file["path"] == "adapter_model.safetensors")
    upload = globex.call("POST", "/uploads", json={"sha256": "cd" * 32, "size": 5}).json()["id"]
    hook = globex.call("POST", "/webhooks", json={"url": "https://receiver.example/hook", "event_types": ["key.revoked"]}).json()["id"]
    delivery = globex.call("POST", f"/webhooks/{hook}/ping").json()["id"]
    key, job = globex.get("/keys")["items"][0]["id"], globex.get("/jobs")["items"][0]["id"]
    assert globex.call("PUT", "/secrets/veiled", json={"value": "x"}).status_code in {200, 201, 204}
    world = World(
        "globex", "veiled", "default", "1", "adapter_config.json", sha256, key, job, "0" * 32, "veiled", "veiled", upload_id=upload
    )
    return replace(world, webhook_id=hook, delivery_id=delivery)


@pytest.fixture
def nothing(theirs: World) -> World:
    absent = {"key_id": "0" * len(theirs.key_id), "job_id": "0" * 32, "webhook_id": "0" * 32, "delivery_id": "0" * 32}
    names = {"tenant": "neverw", "adapter": "ghost1", "model": "ghost1", "name": "ghost1"}
    return replace(theirs, sha256=ABSENT_DIGEST, upload_id="0" * 32, **absent, **names)


def test_what_is_theirs_costs_what_nothing_costs(app: FastAPI, acme: Pusher, theirs: World, nothing: World) -> None:
    acme.client.headers.update(acme.headers)
    wrong = []
    for operation in (name for name, (kind, _) in TABLE.items() if kind == OWNED):
        found = []
        for world in (theirs, nothing):
            with recorded(app) as statements:
                answer = call(acme.client, operation, TABLE[operation][1], world)  # type: ignore[arg-type]
            assert answer.status_code == 404, f"{operation}: {answer.status_code} {answer.text}"
            found.append((visible(answer, world), statements))  # type: ignore[arg-type]
        if found[0] != found[1]:
            wrong.append((operation, found))
    assert not wrong
