"""Registering base models: import, retry, conflicts, who sees what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from registry.artifact.base import compute_base_digest
from registry.audit.models import AuditEvent
from registry.db import Database
from tests.generate import tiny_base
from tests.registry.adapters.pushing import Pusher, adapter, write_base_model
from tests.registry.conftest import MakeTenant, bearer

Work = Callable[[], int]


def wanted(folder: Path, name: str = "tiny", **changes: Any) -> dict[str, Any]:
    return {"name": name, "source": {"kind": "directory", "location": str(folder)}, "upstream_names": ["tests/tiny-llama"]} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base_model(tmp_path / "model")


def test_pending_until_a_job_has_read_it(operator: Pusher, folder: Path, work: Work) -> None:
    response = operator.call("POST", "/base-models", json=wanted(folder))
    assert response.status_code == 202
    assert (response.json()["status"], response.json()["base_digest"]) == ("pending", None)
    job = operator.get(f"/jobs/{response.json()['job_id']}")
    assert (job["kind"], job["state"]) == ("import_base_model", "queued")
    assert work() == 1
    shown = operator.get("/base-models/tiny")
    assert (shown["status"], shown["reason"], shown["location"]) == ("ready", None, str(folder))
    assert shown["base_digest"] == compute_base_digest(folder)
    assert shown["spec"] == tiny_base().to_json()


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda folder: (folder / "config.json").unlink(), "bad_base_model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "bad_base_model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "bad_base_model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 4), "truncated"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "unsupported_base_model"),
        (lambda folder: (folder / "config.json").write_text("{"), "bad_json"),
    ],
)
def test_failed_says_why_and_is_tried_again(
    operator: Pusher, folder: Path, work: Work, *, break_it: Callable[[Path], object], code: str
) -> None:
    break_it(folder)
    operator.call("POST", "/base-models", json=wanted(folder))
    work()
    shown = operator.get("/base-models/tiny")
    assert (shown["status"], shown["reason"]["code"], shown["base_digest"]) == ("failed", code, None)
    assert shown["reason"]["detail"]
    write_base_model(folder)
    again = operator.call("POST", "/base-models", json=wanted(folder)).json()
    assert (again["status"], again["reason"]) == ("pending", None)
    work()
    assert operator.get("/base-models/tiny")["status"] == "ready"


def test_registering_again_changes_nothing(operator: Pusher, folder: Path, work: Work) -> None:
    first = operator.call("POST", "/base-models", json=wanted(folder)).json()
    again = operator.call("POST", "/base-models", json=wanted(folder)).json()
    assert again["job_id"] == first["job_id"], "the import under way is the import"
    assert work() == 1
    ready = operator.call("POST", "/base-models", json=wanted(folder))
    assert (ready.status_code, ready.json()["status"], ready.json()["job_id"]) == (202, "ready", None)
    assert work() == 0


def test_another_source_under_the_same_name_is_a_conflict(operator: Pusher, folder: Path) -> None:
    operator.call("POST", "/base-models", json=wanted(folder))
    response = operator.call("POST", "/base-models", json=wanted(folder, upstream_names=["x/y"]))
    assert (response.status_code, response.json()["code"]) == (409, "base_model_exists")


def test_the_same_bytes_under_another_name_are_refused(operator: Pusher, folder: Path, tmp_path: Path, work: Work) -> None:
    operator.call("POST", "/base-models", json=wanted(folder))
    operator.call("POST", "/base-models", json=wanted(write_base_model(tmp_path / "copy"), "copy"))
    work()
    shown = operator.get("/base-models/copy")
    assert (shown["status"], shown["reason"]["code"]) == ("failed", "duplicate_base_model")
    assert "'tiny'" in shown["reason"]["detail"]


def test_a_cancelled_import_is_started_again(operator: Pusher, folder: Path, work: Work) -> None:
    first = operator.call("POST", "/base-models", json=wanted(folder)).json()
    operator.call("POST", f"/jobs/{first['job_id']}/cancel")
    again = operator.call("POST", "/base-models", json=wanted(folder)).json()
    assert again["job_id"] not in (None, first["job_id"])
    work()
    assert operator.get("/base-models/tiny")["status"] == "ready"


class TestNames:
    def test_may_not_be_an_adapters(self, operator: Pusher, folder: Path, work: Work, *, acme: Pusher) -> None:
        operator.call("POST", "/base-models", json=wanted(folder))
        work()
        assert acme.push("pirate", adapter()).status_code == 201
        response = operator.call("POST", "/base-models", json=wanted(folder, "pirate"))
        assert (response.status_code, response.json()["code"]) == (409, "name_taken")
        acme.call("DELETE", "/adapters/pirate")
        assert operator.call("POST", "/base-models", json=wanted(folder, "pirate")).status_code == 202

    @pytest.mark.parametrize("name", ["", "Tiny", "a/b", "a@1", "-a", "a" * 64])
    def test_that_cannot_be(self, operator: Pusher, folder: Path, name: str) -> None:
        assert operator.call("POST", "/base-models", json=wanted(folder, name)).status_code == 422

    @pytest.fixture
    def acme(self, client: TestClient, make_tenant: MakeTenant) -> Pusher:
        return Pusher(client, bearer(make_tenant("acme")))


class TestDeletion:
    def test_of_an_unused_one(self, operator: Pusher, folder: Path, work: Work) -> None:
        operator.call("POST", "/base-models", json=wanted(folder))
        work()
        assert operator.call("DELETE", "/base-models/tiny").status_code == 204
        assert operator.call("GET", "/base-models/tiny").status_code == 404
        assert operator.call("DELETE", "/base-models/tiny").status_code == 404
        assert operator.call("POST", "/base-models", json=wanted(folder)).status_code == 202

    def test_while_it_is_being_imported(self, operator: Pusher, folder: Path, work: Work) -> None:
        operator.call("POST", "/base-models", json=wanted(folder))
        assert operator.call("DELETE", "/base-models/tiny").status_code == 204
        assert work() == 1
        assert operator.call("GET", "/base-models/tiny").status_code == 404

    def test_is_refused_while_a_version_uses_it(
        self, operator: Pusher, folder: Path, work: Work, *, client: TestClient, make_tenant: MakeTenant
    ) -> None:
        operator.call("POST", "/base-models", json=wanted(folder))
        work()
        acme = Pusher(client, bearer(make_tenant("acme")))
        acme.push("pirate", adapter())
        response = operator.call("DELETE", "/base-models/tiny")
        assert (response.status_code, response.json()["code"]) == (409, "base_model_in_use")
        work()
        assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"


class TestWhoSeesWhat:
    @pytest.fixture
    def reader(self, operator: Pusher, folder: Path, work: Work, *, client: TestClient, make_tenant: MakeTenant) -> Pusher:
        operator.call("POST", "/base-models", json=wanted(folder))
        work()
        return Pusher(client, bearer(make_tenant("acme", "inference")))

    def test_every_key_sees_the_models_but_not_the_operators_paths(self, reader: Pusher, folder: Path) -> None:
        shown = reader.get("/base-models/tiny")
        assert (shown["status"], shown["upstream_names"]) == ("ready", ["tests/tiny-llama"])
        listed = reader.get("/base-models")["items"]
        assert listed == [shown]
        assert str(folder) not in str(listed)

    def test_nor_why_an_import_failed(self, reader: Pusher, operator: Pusher, tmp_path: Path, *, work: Work) -> None:
        operator.call("POST", "/base-models", json=wanted(tmp_path / "absent", "broken"))
        work()
        assert str(tmp_path) in operator.get("/base-models/broken")["reason"]["detail"]
        assert (reader.get("/base-models/broken")["status"], reader.get("/base-models/broken")["reason"]) == ("failed", None)

    def test_only_admins_change_them(self, reader: Pusher, folder: Path) -> None:
        assert reader.call("POST", "/base-models", json=wanted(folder, "other")).status_code == 403
        assert reader.call("DELETE", "/base-models/tiny").status_code == 403


def test_pages(operator: Pusher, folder: Path) -> None:
    for index in range(3):
        operator.call("POST", "/base-models", json=wanted(folder, f"m{index}"))
    first = operator.get("/base-models", params={"limit": 2})
    rest = operator.get("/base-models", params={"limit": 2, "cursor": first["next_cursor"]})
    assert [item["name"] for item in first["items"] + rest["items"]] == ["m2", "m1", "m0"]


def test_audit(operator: Pusher, folder: Path, work: Work, *, database: Database) -> None:
    operator.call("POST", "/base-models", json=wanted(folder))
    work()
    operator.call("DELETE", "/base-models/tiny")
    with database.read() as session:
        statement = select(AuditEvent.action).where(AuditEvent.resource_type == "base_model").order_by(AuditEvent.created_at)
        assert session.scalars(statement).all() == ["base_model.registered", "base_model.ready", "base_model.deleted"]
