"""The data half of the gate: the pushed bytes are hashed and read again before a version is ready."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, text

from registry.blobs.models import Blob
from registry.config import Settings
from registry.db import Database
from tests.registry.adapters.pushing import Pusher, adapter
from workers.__main__ import build_worker
from workers.validate import Validation

Work = Callable[[], int]


def stored(settings: Settings, sha256: str) -> Path:
    return next(settings.blob_dir.glob(f"*/{sha256}"))


@pytest.mark.parametrize(
    ("value", "dtype", "code"),
    [
        (np.nan, "F32", "not_finite"),
        (np.inf, "F32", "not_finite"),
        (-np.inf, "F16", "not_finite"),
        (np.nan, "BF16", "not_finite"),
        (1e30, "F32", "weight_too_large"),
        (1e30, "BF16", "weight_too_large"),
    ],
)
def test_one_bad_weight_rejects(acme: Pusher, work: Work, *, value: float, dtype: str, code: str) -> None:
    good = adapter(dtype=dtype)
    name = good.name(1, "v_proj", "A")
    values = good.tensors[name].copy()
    values[0, -1] = value
    acme.push("bad", good.with_tensors(**{name: values}))
    work()
    version = acme.get("/adapters/bad/versions/1")
    assert (version["status"], version["reason"]["code"]) == ("rejected", code)
    job = acme.get("/jobs")["items"][0]
    assert (job["state"], job["result"]) == ("succeeded", {"outcome": "rejected", "code": code})


@pytest.fixture
def work_to_the_end(work: Work, database: Database) -> Callable[[], None]:
    """Every attempt of every job, without the pauses between them."""

    def make_due() -> None:
        with database.write() as session:
            session.execute(text("UPDATE jobs SET available_at = '2000-01-01 00:00:00.000000' WHERE state = 'queued'"))

    def run() -> None:
        make_due()
        while work():
            make_due()

    return run


def test_damaged_bytes_reject_and_are_asked_for_again(
    acme: Pusher, work: Work, *, work_to_the_end: Callable[[], None], settings: Settings
) -> None:
    files = adapter().files
    pushed = acme.push("pirate", files).json()
    digests = {file["path"]: file["sha256"] for file in pushed["files"]}
    path = stored(settings, digests["adapter_model.safetensors"])
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    work_to_the_end()
    version = acme.get("/adapters/pirate/versions/1")
    assert (version["status"], version["reason"]["code"]) == ("rejected", "blob_damaged")
    assert acme.call("HEAD", f"/blobs/{digests['adapter_model.safetensors']}").status_code == 404
    assert acme.call("HEAD", f"/blobs/{digests['adapter_config.json']}").status_code == 200
    again = acme.push("pirate", files)
    assert (again.status_code, again.json()["number"]) == (200, 1)
    work()
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"


def test_lost_bytes_reject(acme: Pusher, settings: Settings, work_to_the_end: Callable[[], None]) -> None:
    pushed = acme.push("pirate", adapter()).json()
    stored(settings, pushed["files"][0]["sha256"]).unlink()
    work_to_the_end()
    assert acme.get("/adapters/pirate/versions/1")["reason"]["code"] == "blob_missing"


@pytest.mark.parametrize("lasts", [True, False])
def test_bytes_that_go_bad_between_hashing_and_scan_are_no_verdict(
    lasts: bool, acme: Pusher, work: Work, *, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = acme.push("pirate", adapter()).json()
    path = stored(settings, next(file["sha256"] for file in pushed["files"] if file["path"] == "adapter_model.safetensors"))
    good, check, calls = path.read_bytes(), Validation._check, []

    def bad_at_first(self: Validation, *rest: Any) -> None:
        calls.append(1)
        path.write_bytes(good[:-7] if len(calls) == 1 else path.read_bytes())
        try:
            check(self, *rest)
        finally:
            path.write_bytes(path.read_bytes() if lasts else good)

    monkeypatch.setattr(Validation, "_check", bad_at_first)
    assert work() == 1
    assert acme.get("/adapters/pirate/versions/1")["status"] == ("pending" if lasts else "ready")
    assert len(calls) == (1 if lasts else 2)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "away"])
def test_one_bad_reading_is_no_verdict(
    damage: str, acme: Pusher, work: Work, *, work_to_the_end: Callable[[], None], settings: Settings, database: Database
) -> None:
    """A store that gives wrong bytes, fewer or none for a while: the tenant's upload is not to blame."""
    pushed = acme.push("pirate", adapter()).json()
    path = stored(settings, next(file["sha256"] for file in pushed["files"] if file["path"] == "adapter_model.safetensors"))
    good = path.read_bytes()
    wrong = {"truncated": good[:-7], "flipped": good[:-1] + bytes([good[-1] ^ 1])}
    path.unlink() if damage == "away" else path.write_bytes(wrong[damage])
    assert work() == 1
    assert acme.get("/adapters/pirate/versions/1")["status"] == "pending"
    with database.read() as session:
        assert session.scalar(select(Blob.size).where(Blob.sha256 == path.name)) == len(good), "the row's promise is not taken back"
    path.write_bytes(good)
    work_to_the_end()
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"


def test_the_checks_of_the_push_are_made_again(acme: Pusher, settings: Settings, database: Database) -> None:
    """A worker with a stricter setting than the registry had: the job decides."""
    acme.push("wide", adapter(rank=32))
    strict = build_worker(settings.model_copy(update={"max_adapter_rank": 16}), database)
    assert strict.run_one()
    assert acme.get("/adapters/wide/versions/1")["reason"]["code"] == "rank_too_large"


def test_a_job_that_ends_without_a_result_rejects(acme: Pusher, work: Work, database: Database) -> None:
    job_id = acme.push("pirate", adapter()).json()["job_id"]
    with database.write() as session:
        statement = "UPDATE jobs SET state = 'running', attempt = max_attempts, lease_expires_at = '2000-01-01 00:00:00.000000'"
        session.execute(text(statement))
    assert work() == 0
    assert acme.get(f"/jobs/{job_id}")["state"] == "failed"
    version = acme.get("/adapters/pirate/versions/1")
    assert (version["status"], version["reason"]["code"]) == ("rejected", "worker_lost")
    assert "push the same bytes again" in version["reason"]["detail"]
    acme.push("pirate", adapter())
    work()
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"


def test_two_jobs_for_one_version_publish_once(acme: Pusher, work: Work, database: Database) -> None:
    acme.push("pirate", adapter())
    with database.write() as session:
        columns = "tenant_id, subject_id, kind, payload, state, attempt, max_attempts, fence"
        columns += ", available_at, cancel_requested, created_at, updated_at"
        session.execute(text(f"INSERT INTO jobs (id, {columns}) SELECT 'twin', {columns} FROM jobs WHERE kind = 'validate_version'"))
    assert work() == 2
    outcomes = sorted(job["result"]["outcome"] for job in acme.get("/jobs")["items"])
    assert outcomes == ["gone", "ready"]
    assert len(acme.get("/adapters/pirate/versions/1")["forms"]) == 1
    assert len(acme.get("/adapters/pirate/aliases/default/history")["items"]) == 1
