"""From bytes to a ready version: identical bytes, refusals at once, rejections later, base model, races."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import func, select

from registry.adapters.models import AdapterVersion, Alias, AliasMove, Form
from registry.config import Settings
from registry.db import Database, Table
from tests.generate import GeneratedAdapter, generate_adapter, tiny_base
from tests.registry.adapters.pushing import Pusher, adapter, nan_adapter, sha256, write_base_model

Work = Callable[[], int]


def test_push_becomes_ready_and_sets_default(acme: Pusher, work: Work) -> None:
    response = acme.push("pirate", adapter(), description="Arr", tags=["demo"])
    assert response.status_code == 201, response.text
    pushed = response.json()
    assert (pushed["number"], pushed["status"], pushed["base_model"], pushed["rank"]) == (1, "pending", "tiny", 4)
    assert pushed["targets"] == ["q_proj", "k_proj", "v_proj"]
    assert pushed["num_params"] == sum(value.size for value in adapter().tensors.values())
    assert acme.get("/adapters/pirate/aliases") == []
    assert work() == 1
    version = acme.get("/adapters/pirate/versions/1")
    assert (version["status"], version["reason"]) == ("ready", None)
    assert [form["kind"] for form in version["forms"]] == ["raw"]
    shown = acme.get("/adapters/pirate")
    assert shown["aliases"] == {"default": 1}
    assert (shown["description"], shown["tags"], shown["num_versions"], shown["latest_version"]) == ("Arr", ["demo"], 1, 1)


def test_digests_are_the_documented_ones(acme: Pusher, work: Work) -> None:
    files = adapter().files
    acme.push("pirate", files)
    work()
    version = acme.get("/adapters/pirate/versions/1")
    entries = [{"path": path, "sha256": sha256(data), "size": len(data)} for path, data in sorted(files.items())]

    def canonical(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    assert version["version_digest"] == canonical({"schema": 1, "files": entries})
    blobs = {entry["path"]: {"sha256": entry["sha256"], "size": entry["size"]} for entry in entries}
    base_digest = acme.get("/base-models/tiny")["base_digest"]
    form = {"schema": 1, "kind": "raw", "base_digest": base_digest, "blobs": blobs}
    assert version["forms"][0]["form_digest"] == canonical(form)


def test_identical_bytes_of_a_ready_version_change_nothing(acme: Pusher, work: Work) -> None:
    first = acme.push("pirate", adapter()).json()
    work()
    again = acme.push("pirate", adapter())
    assert again.status_code == 200
    assert (again.json()["number"], again.json()["version_digest"], again.json()["job_id"]) == (1, first["version_digest"], None)
    assert work() == 0
    assert len(acme.get("/adapters/pirate/versions")["items"]) == 1


def test_identical_bytes_of_a_pending_version_share_its_job(acme: Pusher, work: Work) -> None:
    first, again = acme.push("pirate", adapter()), acme.push("pirate", adapter())
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["job_id"] == again.json()["job_id"]
    assert work() == 1


def test_a_pending_version_whose_job_was_cancelled_gets_another(acme: Pusher, work: Work) -> None:
    first = acme.push("pirate", adapter()).json()
    assert acme.call("POST", f"/jobs/{first['job_id']}/cancel").status_code == 200
    assert work() == 0
    again = acme.push("pirate", adapter()).json()
    assert again["status"] == "pending"
    assert again["job_id"] != first["job_id"]
    assert work() == 1
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"


def test_nan_is_rejected_by_the_job_and_never_gets_an_alias(acme: Pusher, work: Work) -> None:
    assert acme.push("bad", nan_adapter()).status_code == 201
    work()
    version = acme.get("/adapters/bad/versions/1")
    assert (version["status"], version["reason"]["code"], version["forms"]) == ("rejected", "not_finite", [])
    assert "q_proj.lora_B" in version["reason"]["detail"]
    assert acme.get("/adapters/bad")["aliases"] == {}
    assert acme.put_alias("bad", "prod", 1, **{"If-None-Match": "*"}).status_code == 409


def test_identical_bytes_of_a_rejected_version_are_validated_again(acme: Pusher, work: Work) -> None:
    acme.push("bad", nan_adapter())
    work()
    again = acme.push("bad", nan_adapter())
    assert again.status_code == 200
    assert (again.json()["number"], again.json()["status"], again.json()["reason"]) == (1, "pending", None)
    assert work() == 1
    assert acme.get("/adapters/bad/versions/1")["status"] == "rejected"


def test_default_is_set_by_the_first_ready_version_only(acme: Pusher, work: Work) -> None:
    acme.push("pirate", nan_adapter())
    acme.push("pirate", adapter(1))
    acme.push("pirate", adapter(2))
    work()
    assert [item["status"] for item in acme.get("/adapters/pirate/versions")["items"]] == ["ready", "ready", "rejected"]
    assert acme.get("/adapters/pirate")["aliases"] == {"default": 2}
    assert acme.call("DELETE", "/adapters/pirate/aliases/default").status_code == 204
    acme.push("pirate", adapter(3))
    work()
    assert acme.get("/adapters/pirate")["aliases"] == {}, "removed by hand beside ready versions: it stays away"


def test_refused_at_once_with_code_field_value_and_remedy(acme: Pusher) -> None:
    response = acme.push("pirate", adapter().with_config(use_dora=True))
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "dora"
    assert problem["field"]
    assert problem["remedy"]
    assert acme.call("GET", "/adapters/pirate").status_code == 404, "a refused push creates nothing"


REFUSALS: list[tuple[GeneratedAdapter | dict[str, bytes], str]] = [
    ({"adapter_config.json": b"{}"}, "missing_file"),
    ({**adapter().files, "adapter_model.bin": b"\x80\x02"}, "pickle"),
    ({**adapter().files, "../evil": b"x"}, "unsafe_path"),
    ({**adapter().files, "notes.txt": b"x"}, "unexpected_file"),
    ({"adapter_config.json": b"not json", "adapter_model.safetensors": adapter().weights_bytes}, "bad_json"),
    ({"adapter_config.json": adapter().config_bytes, "adapter_model.safetensors": b"\xff" * 64}, "header_too_large"),
    (adapter().files | {"adapter_model.safetensors": adapter().weights_bytes[:-4]}, "truncated"),
    (generate_adapter(tiny_base(hidden_size=32), rank=4), "wrong_shape"),
    (adapter(rank=256), "rank_too_large"),
]


def test_every_refusal_reaches_the_client_as_a_problem(acme: Pusher) -> None:
    """The table of all of them is in tests/artifact; here one of each stage."""
    for files, code in REFUSALS:
        response = acme.push("pirate", files)
        assert (response.status_code, response.json()["code"]) == (422, code), response.text
        assert response.headers["content-type"] == "application/problem+json"
    assert acme.get("/adapters")["items"] == []


def test_a_blob_that_was_not_uploaded_is_named(acme: Pusher, globex: Pusher) -> None:
    files = globex.upload(adapter().files)  # another tenant's bytes are not ours
    response = acme.call("POST", "/adapters/pirate/versions", json={"files": files})
    assert (response.status_code, response.json()["code"]) == (422, "blob_missing")
    assert response.json()["value"] in files.values()


def test_bytes_that_a_disk_lost_are_asked_for_again(acme: Pusher, work: Work, settings: Settings) -> None:
    files = acme.upload(adapter().files)
    path = next(settings.blob_dir.glob(f"*/{files['adapter_model.safetensors']}"))
    path.unlink()
    assert acme.call("HEAD", f"/blobs/{files['adapter_model.safetensors']}").status_code == 404
    response = acme.call("POST", "/adapters/pirate/versions", json={"files": files})
    assert (response.status_code, response.json()["code"]) == (422, "blob_missing")
    assert acme.push("pirate", adapter()).status_code == 201
    work()
    assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"


def test_what_a_stranger_wrote_is_not_repeated_at_length(acme: Pusher) -> None:
    long_path = acme.call("POST", "/adapters/pirate/versions", json={"files": {"x" * 10**5: "0" * 64}})
    assert (long_path.status_code, long_path.json()["code"]) == (422, "unsafe_path")
    long_name = acme.push("pirate", adapter(base_name="\x1b[31m" + "y" * 900))
    assert (long_name.status_code, long_name.json()["code"]) == (422, "base_model_unknown")
    for response in (long_path, long_name):
        assert len(response.content) < 1500
        assert "y" * 300 not in response.text
        assert "\\u001b[31m" not in response.text


class TestBaseModel:
    def test_is_found_by_the_config(self, acme: Pusher) -> None:
        assert acme.push("pirate", adapter()).json()["base_model"] == "tiny"

    def test_must_be_named_where_the_config_is_no_help(self, acme: Pusher) -> None:
        local = adapter(base_name="/home/me/checkpoints/7")
        response = acme.push("pirate", local)
        assert (response.status_code, response.json()["code"], response.json()["field"]) == (422, "base_model_unknown", "base_model")
        assert acme.push("pirate", local, base_model="tiny").status_code == 201

    def test_unknown_name_is_refused(self, acme: Pusher) -> None:
        response = acme.push("pirate", adapter(), base_model="huge")
        assert (response.status_code, response.json()["code"]) == (422, "base_model_unknown")

    def test_the_name_of_another_registered_model_contradicts(self, acme: Pusher, operator: Pusher, tmp_path: Path, work: Work) -> None:
        register(operator, "other", tmp_path / "other", upstream="tests/other")
        work()
        response = acme.push("pirate", adapter(base_name="tests/other"), base_model="tiny")
        assert (response.status_code, response.json()["code"]) == (422, "wrong_base_model")

    def test_a_name_that_two_models_claim_is_ambiguous(self, acme: Pusher, operator: Pusher, tmp_path: Path, work: Work) -> None:
        register(operator, "twin", tmp_path / "twin", upstream=adapter().config["base_model_name_or_path"])
        work()
        response = acme.push("pirate", adapter())
        assert (response.status_code, response.json()["code"]) == (422, "base_model_ambiguous")
        assert acme.push("pirate", adapter(), base_model="twin").json()["base_model"] == "twin"

    def test_that_is_not_ready_is_a_conflict(self, acme: Pusher, operator: Pusher, tmp_path: Path) -> None:
        register(operator, "slow", tmp_path / "slow", upstream="tests/slow")
        response = acme.push("pirate", adapter(base_name="tests/slow"))
        assert (response.status_code, response.json()["code"]) == (409, "base_model_not_ready")

    def test_adapters_may_not_be_called_like_one(self, acme: Pusher) -> None:
        response = acme.push("tiny", adapter())
        assert (response.status_code, response.json()["code"]) == (409, "name_taken")

    def test_all_versions_of_an_adapter_share_one(self, acme: Pusher, operator: Pusher, tmp_path: Path, work: Work) -> None:
        register(operator, "other", tmp_path / "other", upstream="tests/other")
        work()
        assert acme.push("pirate", adapter()).status_code == 201
        response = acme.push("pirate", adapter(base_name="tests/other"))
        assert (response.status_code, response.json()["code"]) == (422, "base_model_mismatch")


def register(operator: Pusher, name: str, folder: Path, *, upstream: str) -> None:
    source = {"kind": "directory", "location": str(write_base_model(folder, seed=len(name)))}
    response = operator.call("POST", "/base-models", json={"name": name, "source": source, "upstream_names": [upstream]})
    assert response.status_code == 202, response.text


class TestRaces:
    """Clients at once: the endpoint's two units of work interleave in as many threads."""

    def test_two_pushes_of_the_same_bytes_are_one_version(self, acme: Pusher, database: Database, work: Work) -> None:
        pushed = push_at_once(acme, [adapter()] * 6)
        assert sorted(code for code, _number in pushed) == [200] * 5 + [201]
        assert {number for _code, number in pushed} == {1}
        assert count(database, AdapterVersion) == 1
        assert work() == 1
        assert count(database, Form) == 1

    def test_pushes_of_different_bytes_are_numbered_without_gaps(self, acme: Pusher, database: Database, work: Work) -> None:
        pushed = push_at_once(acme, [adapter(seed) for seed in range(6)])
        assert sorted(number for _code, number in pushed) == [1, 2, 3, 4, 5, 6]
        assert work() == 6
        assert (count(database, Form), count(database, Alias), count(database, AliasMove)) == (6, 1, 1)


def push_at_once(pusher: Pusher, adapters: list[GeneratedAdapter]) -> list[tuple[int, int]]:
    """(status, number) of each push; the bytes are there before, so that the pushes themselves collide."""
    for each in adapters:
        pusher.upload(each.files)
    bodies = [{"files": {path: sha256(data) for path, data in each.files.items()}} for each in adapters]
    barrier = threading.Barrier(len(bodies))

    def push(body: dict[str, object]) -> tuple[int, int]:
        barrier.wait()
        response = pusher.call("POST", "/adapters/raced/versions", json=body)
        return response.status_code, response.json()["number"]

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(push, bodies))


def count(database: Database, table: type[Table]) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0
