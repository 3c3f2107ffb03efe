"""Base models from a hub: the right files and no others, whole or not at all, resumed, and by whose token."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from registry.artifact.base import compute_base_digest
from registry.config import Settings
from registry.db import Database
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.base_models.fake_hub import INDEX, SHARDS, STRAY, TOKEN, FakeHub, sharded_model
from tests.registry.conftest import SECRET_KEY, MakeTenant, bearer, serve
from tests.workers.processes import worker_processes

Work = Callable[[], int]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    made = FakeHub(sharded_model(tmp_path / "published"))
    with serve(made.app) as url:
        made.url = url
        yield made


@pytest.fixture
def settings(hub: FakeHub, tmp_path: Path, database_urls: dict[str, Any]) -> Settings:
    return Settings(
        state_dir=tmp_path / "state",
        secret_key=SecretStr(SECRET_KEY),
        hub_endpoints=(hub.url,),
        outbound_allow_hosts=("127.0.0.1", "localhost"),
        outbound_allow_http=True,
        **database_urls,
    )


@pytest.fixture
def ops(client: TestClient, admin_token: str, make_tenant: MakeTenant) -> Pusher:
    """An operator who acts in the tenant `ops`, which has a token for the hub."""
    make_tenant("ops")
    made = Pusher(client, bearer(admin_token, "ops"))
    assert made.call("PUT", "/secrets/hub", json={"value": TOKEN}).status_code == 201
    return made


def body(hub: FakeHub, location: str = "org/base", **source: Any) -> dict[str, Any]:
    named = {"kind": "hub", "location": location, "endpoint": hub.url, "token_secret": "hub"} | source
    return {"name": "base", "source": {field: value for field, value in named.items() if value is not None}}


def outcome(ops: Pusher, hub: FakeHub, work: Work, location: str = "org/base", **source: Any) -> tuple[str, str | None]:
    """Status of the model and the code of its failure, once it was asked for (again)."""
    asked = ops.call("POST", "/base-models", json=body(hub, location, **source))
    assert asked.status_code == 202, asked.text
    work()
    model = ops.get("/base-models/base")
    return model["status"], (model["reason"] or {}).get("code")


def leftovers(settings: Settings) -> list[Path]:
    return list(settings.model_dir.glob(".hub-*"))


@pytest.mark.postgresql
def test_a_sharded_model_of_a_private_repository(
    *, hub: FakeHub, ops: Pusher, operator: Pusher, work: Work, settings: Settings, client: TestClient, make_tenant: MakeTenant
) -> None:
    asked = ops.call("POST", "/base-models", json=body(hub, "org/base@v1.0"))
    assert asked.status_code == 202, asked.text
    assert work() == 1
    model = ops.get("/base-models/base")
    assert (model["status"], model["reason"], model["upstream_names"]) == ("ready", None, ["org/base"])
    location = Path(model["location"])
    assert location.parent == settings.model_dir
    kept = {path.name: path.read_bytes() for path in location.iterdir()}
    assert kept == {name: data for name, data in hub.files.items() if name not in STRAY and name != INDEX}
    assert compute_base_digest(location) == model["base_digest"]
    assert set(hub.tokens_at_the_store) == {None}, "another origin never sees the token"
    assert leftovers(settings) == []
    job = operator.get(f"/jobs/{asked.json()['job_id']}")
    assert job["progress"]["total_bytes"] >= job["progress"]["done_bytes"] > 0
    assert TOKEN not in json.dumps([job, model])
    again = ops.call("POST", "/base-models", json=body(hub, "org/base@v1.0"))
    assert (again.status_code, again.json()["job_id"]) == (202, None)
    assert ops.call("POST", "/base-models", json=body(hub, "org/base@main")).status_code == 409
    tenant = Pusher(client, bearer(make_tenant("acme")))
    assert tenant.get("/base-models/base")["source"] is None
    pushed = tenant.push("mine", adapter(base_name="org/base"))
    assert pushed.status_code == 201, "an adapter that names the repository finds its base model"


def test_a_broken_connection_goes_on_where_it_stopped(hub: FakeHub, ops: Pusher, work: Work) -> None:
    hub.break_after = 1000
    assert outcome(ops, hub, work) == ("ready", None)
    assert hub.ranges == ["bytes=1000-"], "within one attempt"


def cancel(operator: Pusher) -> None:
    """The import's job, so that asking again makes another one at once."""
    job = operator.get("/jobs")["items"][0]
    assert job["state"] == "queued"
    assert operator.call("POST", f"/jobs/{job['id']}/cancel").status_code in {200, 202}


def test_another_job_goes_on_with_what_has_come(hub: FakeHub, ops: Pusher, operator: Pusher, work: Work) -> None:
    hub.break_after = 0
    assert outcome(ops, hub, work) == ("pending", None), "no byte came, so the hub has failed for now"
    assert "config.json" in hub.served
    cancel(operator)
    served = len(hub.served)
    assert outcome(ops, hub, work) == ("ready", None)
    assert "config.json" not in hub.served[served:]


def test_a_hub_without_ranges_starts_over(hub: FakeHub, ops: Pusher, work: Work) -> None:
    hub.break_after, hub.ignores_ranges = 1000, True
    assert outcome(ops, hub, work) == ("ready", None)
    assert hub.served.count(SHARDS[0]) == 2


@pytest.mark.parametrize("path", [SHARDS[1], "tokenizer.json"])
def test_bytes_that_are_not_the_announced_ones_are_never_used(hub: FakeHub, ops: Pusher, work: Work, settings: Settings, path: str) -> None:
    hub.announced[path] = ("a" * 64) if path in SHARDS else ("a" * 40)
    assert outcome(ops, hub, work) == ("pending", None), "a hub may heal"
    (folder,) = leftovers(settings)
    assert not list(folder.glob(f"{path}*"))


def change_index(hub: FakeHub, **placed: str) -> None:
    index = json.loads(hub.files[INDEX])
    index["weight_map"] |= placed
    hub.files[INDEX] = json.dumps(index).encode()


def test_repositories_that_will_never_do(hub: FakeHub, ops: Pusher, work: Work, settings: Settings) -> None:
    good = dict(hub.files)

    def refused(expected: str) -> None:
        assert outcome(ops, hub, work) == ("failed", expected)
        assert leftovers(settings) == [], expected
        hub.files = dict(good)

    del hub.files["tokenizer.json"]
    refused("hub_no_model")
    del hub.files[INDEX]
    refused("hub_no_model")  # shards without an index, and a pickle
    change_index(hub, extra="../../../etc/passwd.safetensors")
    refused("hub_no_model")
    change_index(hub, extra="absent.safetensors")
    refused("hub_no_model")
    change_index(hub, extra=SHARDS[0])
    refused("bad_base_model")
    hub.files[INDEX] = b'{"weight_map": []}'
    refused("hub_no_model")
    hub.files["config.json"] = json.dumps(json.loads(good["config.json"]) | {"model_type": "mamba"}).encode()
    before = len(hub.tokens_at_the_store)
    refused("unsupported_base_model")
    assert len(hub.tokens_at_the_store) == before, "no weights for a family that is not served"
    assert outcome(ops, hub, work, "org/base@nope") == ("failed", "hub_revision_not_found")
    assert outcome(ops, hub, work, token_secret=None) == ("failed", "hub_repo_not_found")
    assert outcome(ops, hub, work) == ("ready", None)


def test_a_disk_without_room(hub: FakeHub, ops: Pusher, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=100))
    assert outcome(ops, hub, work) == ("failed", "disk_full")
    assert not hub.tokens_at_the_store


def test_two_workers_do_not_write_one_folder(hub: FakeHub, ops: Pusher, operator: Pusher, work: Work, settings: Settings) -> None:
    hub.break_after = 0
    assert outcome(ops, hub, work) == ("pending", None)
    (folder,) = leftovers(settings)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    cancel(operator)
    assert outcome(ops, hub, work) == ("pending", None), "it is tried again later"
    os.close(descriptor)
    cancel(operator)
    assert outcome(ops, hub, work) == ("ready", None)


def test_abandoned_downloads_are_removed(hub: FakeHub, ops: Pusher, work: Work, settings: Settings) -> None:
    old, fresh = settings.model_dir / ".hub-old", settings.model_dir / ".hub-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
        (folder / "config.json.part").write_bytes(b"x")
    for path in (old / "config.json.part", old):
        os.utime(path, (0, 0))
    assert outcome(ops, hub, work) == ("ready", None)
    assert leftovers(settings) == [fresh]


@pytest.mark.full
def test_a_worker_killed_half_way_is_followed_by_one_that_goes_on(
    *, hub: FakeHub, ops: Pusher, settings: Settings, database: Database, tmp_path: Path
) -> None:
    """Its lock dies with it, its lease runs out, and the next one asks for the rest alone."""
    hub.holds = release = threading.Event()
    guard = {"LORARY_OUTBOUND_ALLOW_HOSTS": "127.0.0.1,localhost", "LORARY_OUTBOUND_ALLOW_HTTP": "1", "LORARY_SECRET_KEY": SECRET_KEY}
    with worker_processes(settings, tmp_path) as start:
        first = start(**guard)
        assert ops.call("POST", "/base-models", json=body(hub)).status_code == 202
        assert hub.half_sent.wait(30)
        wait_for(lambda: any(path.stat().st_size for folder in leftovers(settings) for path in folder.glob("*.safetensors.part")))
        first.kill()
        first.wait()
        release.set()
        start(**guard)
        wait_for(lambda: ops.get("/base-models/base")["status"] == "ready")
    assert len(hub.ranges) == 1, "of the file that was half here"
    assert leftovers(settings) == []


def wait_for(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far in time"
        time.sleep(0.05)


def test_requests_that_make_no_sense(hub: FakeHub, ops: Pusher, operator: Pusher) -> None:
    def field_of(answer: Any) -> str:
        assert answer.status_code == 422, answer.text
        return str(answer.json()["field"])

    for location in ("base", "org/base@", "org/../base", "org/base@a b", "org/" + "x" * 100, "a/b/c", "@v1"):
        assert field_of(ops.call("POST", "/base-models", json=body(hub, location))).startswith("body.source"), location
    directory = {"name": "base", "source": {"kind": "directory", "location": "/models/x", "endpoint": hub.url}}
    assert field_of(ops.call("POST", "/base-models", json=directory)).startswith("body.source")
    assert field_of(ops.call("POST", "/base-models", json=body(hub, endpoint="http://169.254.169.254"))) == "endpoint"
    assert field_of(ops.call("POST", "/base-models", json=body(hub, token_secret="absent"))) == "token_secret"
    assert field_of(operator.call("POST", "/base-models", json=body(hub))) == "token_secret", "whose secret?"
