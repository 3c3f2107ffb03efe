"""Pushing and pulling real bytes through a real registry, with its gate and its worker."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from registry.artifact.base import BaseSpec
from registry.blobs.models import Blob
from registry.cli import push
from registry.db import Database
from tests.cli.conftest import Lorary, Registry
from tests.generate import generate_adapter

pytestmark = pytest.mark.usefixtures("base_model")


@pytest.fixture(scope="session")
def spec(tiny_model_dir: Path) -> BaseSpec:
    return BaseSpec.from_config(json.loads((tiny_model_dir / "config.json").read_text()))


@pytest.fixture
def folder(tmp_path: Path, spec: BaseSpec) -> Path:
    return generate_adapter(spec, seed=1).write(tmp_path / "adapter")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_push_waits_until_ready_and_pull_brings_the_same_bytes(tenant: Lorary, folder: Path, tmp_path: Path) -> None:
    version = tenant.ok("adapters", "push", "style", str(folder))
    assert (version["status"], version["number"], version["rank"]) == ("ready", 1, 4)
    pulled = tenant("adapters", "pull", "style", str(tmp_path / "new" / "copy"), "-o", "json")
    assert pulled.code == 0, pulled.stderr
    assert pulled.json()["version_digest"] == version["version_digest"]
    assert contents(tmp_path / "new" / "copy") == contents(folder)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["copy"], "a staging folder stayed behind"


def test_identical_bytes_give_the_same_version_without_uploading(tenant: Lorary, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tenant.ok("adapters", "push", "style", str(folder))
    monkeypatch.setattr(push, "_upload_one", lambda *_: pytest.fail("uploaded bytes that the registry has"))
    assert tenant.ok("adapters", "push", "style", str(folder))["number"] == first["number"]


def test_bytes_that_were_collected_before_they_were_named_are_sent_again(
    tenant: Lorary, spec: BaseSpec, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = generate_adapter(spec, seed=31).write(tmp_path / "collected")  # bytes of no other test, whose rows would go too
    database, name = Database(registry.settings.resolved_database_url), push._name
    lost = [hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()]

    def collected_just_now(call: Any, *rest: Any) -> Any:
        while lost:
            with database.system_write() as session:
                session.execute(delete(Blob).where(Blob.sha256 == lost.pop()))
        return name(call, *rest)

    monkeypatch.setattr(push, "_name", collected_just_now)
    assert tenant.ok("adapters", "push", "pirate", str(folder))["status"] == "ready"
    database.close()
    assert not lost


def test_push_moves_the_alias_that_was_asked_for(tenant: Lorary, folder: Path, spec: BaseSpec, tmp_path: Path) -> None:
    tenant.ok("adapters", "push", "style", str(folder), "--alias", "prod", "--description", "first")
    other = generate_adapter(spec, seed=2).write(tmp_path / "other")
    tenant.ok("adapters", "push", "style", str(other), "--alias", "prod")
    shown = tenant.ok("adapters", "show", "style")
    assert {alias["alias"]: alias["version"] for alias in shown["aliases"]} == {"default": 1, "prod": 2}
    assert [version["number"] for version in shown["versions"]] == [2, 1]
    tenant.ok("adapters", "pull", "style@prod", str(tmp_path / "prod"))
    assert contents(tmp_path / "prod") == contents(other)
    tenant.ok("adapters", "pull", "style@1", str(tmp_path / "one"))
    assert contents(tmp_path / "one") == contents(folder)


def test_alias_set_is_a_compare_and_swap_with_history(tenant: Lorary, folder: Path, spec: BaseSpec, tmp_path: Path) -> None:
    tenant.ok("adapters", "push", "style", str(folder))
    tenant.ok("adapters", "push", "style", str(generate_adapter(spec, seed=3).write(tmp_path / "two")))
    assert tenant.ok("adapters", "alias", "set", "style", "prod", "1", "--expect", "0")["generation"] == 1
    lost = tenant("adapters", "alias", "set", "style", "prod", "2", "--expect", "0")
    assert lost.code == 1
    assert "status: 412" in lost.stderr
    assert tenant.ok("adapters", "alias", "set", "style", "prod", "2", "--expect", "1")["version"] == 2
    assert [move["version"] for move in tenant.ok("adapters", "alias", "history", "style", "prod")] == [2, 1]
    assert tenant("adapters", "alias", "delete", "style", "prod", "--yes").code == 0
    assert [alias["alias"] for alias in tenant.ok("adapters", "alias", "list", "style")] == ["default"]


def test_a_rejected_version_ends_with_its_reason(tenant: Lorary, spec: BaseSpec, tmp_path: Path) -> None:
    adapter = generate_adapter(spec, seed=4)
    name = adapter.name(0, "q_proj", "A")
    broken = adapter.with_tensors(**{name: adapter.tensors[name] * float("nan")}).write(tmp_path / "nan")
    done = tenant("adapters", "push", "broken", str(broken), "--alias", "prod")
    assert done.code == 1
    assert "rejected" in done.stderr
    assert name in done.stderr, "the reason names the tensor"
    assert ["status", "rejected"] in [line.split() for line in done.stdout.splitlines()]
    assert [alias["alias"] for alias in tenant.ok("adapters", "alias", "list", "broken")] == []


def test_what_the_registry_refuses_at_once_is_told_with_field_and_remedy(tenant: Lorary, spec: BaseSpec, tmp_path: Path) -> None:
    dora = generate_adapter(spec, use_dora=True).write(tmp_path / "dora")
    done = tenant("adapters", "push", "dora", str(dora))
    assert done.code == 1
    assert done.stdout == ""
    assert "use_dora" in done.stderr
    assert "remedy:" in done.stderr
    assert "status: 422" in done.stderr


@pytest.mark.parametrize(
    ("absent", "extra", "said"),
    [
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_model.safetensors", None, "save the adapter with PEFT's"),
        ("adapter_model.safetensors", "adapter_model.bin", "is a pickle, which is never accepted"),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused_before_anything_is_sent(
    tenant: Lorary, folder: Path, absent: str, extra: str | None, said: str
) -> None:
    (folder / absent).unlink()
    if extra:
        (folder / extra).write_bytes(b"x")
    done = tenant("adapters", "push", "style", str(folder))
    assert done.code == 1
    assert said in done.stderr
    assert tenant.ok("adapters", "list") == []


def test_a_file_over_the_inline_limit_goes_in_parts_and_meets_the_same_gate(tenant: Lorary, folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(65 * 2**20)
    done = tenant("adapters", "push", "style", str(folder))
    assert done.code == 1
    assert "code: bad_header" in done.stderr


def test_other_files_of_the_folder_are_named_and_left(tenant: Lorary, folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "README.md").write_text("# about")
    done = tenant("adapters", "push", "style", str(folder), "-o", "json")
    assert done.code == 0, done.stderr
    assert "optimizer.pt" in done.stderr
    assert {file["path"] for file in done.json()["files"]} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_no_wait_answers_before_the_gate_and_alias_needs_the_wait(tenant: Lorary, folder: Path) -> None:
    usage = tenant("adapters", "push", "style", str(folder), "--no-wait", "--alias", "prod")
    assert usage.code == 2
    assert tenant.ok("adapters", "list") == []
    version = tenant.ok("adapters", "push", "style", str(folder), "--no-wait")
    assert tenant.ok("jobs", "watch", version["job_id"])["state"] == "succeeded"
    assert tenant.ok("jobs", "list")[0]["kind"] == "validate_version"


def test_pull_never_overwrites_other_bytes_unless_forced(tenant: Lorary, folder: Path, tmp_path: Path) -> None:
    tenant.ok("adapters", "push", "style", str(folder))
    target = shutil.copytree(folder, tmp_path / "target")
    (target / "notes.txt").write_text("mine")
    assert tenant("adapters", "pull", "style", str(target)).code == 0, "equal files are no obstacle"
    (target / "adapter_config.json").write_text("{}")
    refused = tenant("adapters", "pull", "style", str(target))
    assert refused.code == 1
    assert "adapter_config.json" in refused.stderr
    assert (target / "adapter_config.json").read_text() == "{}"
    assert tenant("adapters", "pull", "style", str(target), "--force").code == 0
    assert contents(target) == contents(folder) | {"notes.txt": b"mine"}


def test_a_damaged_download_leaves_nothing(admin: Lorary, tenant: Lorary, folder: Path, tmp_path: Path, registry: Registry) -> None:
    tenant.ok("adapters", "push", "style", str(folder))
    tenant_id = admin.ok("tenants", "show", tenant.ok("keys", "whoami")["tenant"])["id"]
    weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    [stored] = [file for file in registry.settings.blob_dir.rglob(weights) if tenant_id in file.parts]
    stored.chmod(0o600)
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = tenant("adapters", "pull", "style", str(tmp_path / "copy"))
    stored.write_bytes(whole)
    assert done.code == 1
    assert "arrived damaged" in done.stderr
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob(".copy*"))


def test_delete_asks_first_and_deletes_a_version_or_all(tenant: Lorary, folder: Path, spec: BaseSpec, tmp_path: Path) -> None:
    tenant.ok("adapters", "push", "style", str(folder))
    tenant.ok("adapters", "push", "style", str(generate_adapter(spec, seed=6).write(tmp_path / "two")))
    assert tenant("adapters", "delete", "style").code == 2, "nobody can answer a question here"
    assert tenant("adapters", "delete", "style@prod", "--yes").code == 2
    assert tenant("adapters", "delete", "style@2", "--yes").code == 0
    assert [version["number"] for version in tenant.ok("adapters", "show", "style")["versions"]] == [1]
    assert tenant("adapters", "delete", "style", "--yes").code == 0
    gone = tenant("adapters", "show", "style")
    assert gone.code == 1
    assert "status: 404" in gone.stderr


def test_listing_as_a_table_is_one_whole_line_an_adapter(tenant: Lorary, folder: Path) -> None:
    text = "a description that is far longer than eighty columns, so that a terminal of that width would have to wrap it \x1b[31m"
    tenant.ok("adapters", "push", "style", str(folder), "--description", text)
    header, row = tenant("adapters", "list").stdout.splitlines()
    assert header.split()[:3] == ["NAME", "BASE", "MODEL"]
    assert row.startswith("style")
    assert text.replace("\x1b", "\\x1b") in row, "control characters of others never reach a terminal"


def test_a_target_that_cannot_be_written_is_a_sentence(tenant: Lorary, folder: Path, tmp_path: Path) -> None:
    tenant.ok("adapters", "push", "style", str(folder))
    (tmp_path / "file").write_text("")
    for target in ("file", "file/below"):
        done = tenant("adapters", "pull", "style", str(tmp_path / target))
        assert done.code == 1
        assert str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize("reference", ["@3", "style@"])
def test_a_reference_that_names_nothing_is_refused(tenant: Lorary, reference: str, tmp_path: Path) -> None:
    done = tenant("adapters", "pull", reference, str(tmp_path / "copy"))
    assert done.code == 1
    assert "is not a reference" in done.stderr


def test_a_push_that_cannot_tell_its_base_model_names_the_option(tenant: Lorary, spec: BaseSpec, tmp_path: Path) -> None:
    folder = generate_adapter(spec, seed=1).write(tmp_path / "stranger")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/nobody-knows-it"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused = tenant("adapters", "push", "style", str(folder))
    assert refused.code == 1
    assert "--base-model" in refused.stderr


def test_a_push_says_what_links_lead_to(tenant: Lorary, folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    pushed = tenant("adapters", "push", "style", str(linked), "-o", "json")
    assert pushed.json()["status"] == "ready"
    assert f"adapter_config.json is a link to {folder / 'adapter_config.json'}" in " ".join(pushed.stderr.split())


def test_lineage_tells_who_from_what_and_into_what(tenant: Lorary, folder: Path) -> None:
    version = tenant.ok("adapters", "push", "style", str(folder))
    found = tenant.ok("adapters", "lineage", "style@1")
    assert [(link["relation"], link["kind"]) for link in found["came_from"]] == [("pushed_by", "key"), ("made_for", "base_model")]
    assert found["came_from"][0]["id"] == version["created_by"]
    assert [link["id"] for link in found["made_into"]] == [form["form_digest"] for form in version["forms"]]
    assert "made_for" in tenant("adapters", "lineage", "style").stdout


def test_adapters_are_tagged_and_found(tenant: Lorary, folder: Path) -> None:
    tenant.ok("adapters", "push", "style", str(folder), "--tag", "team:red", "--description", "Pirate talk")
    assert tenant.ok("adapters", "tag", "style", "draft", "lang:en", "--remove", "team:red")["tags"] == ["draft", "lang:en"]
    for options in (("-q", "pirate"), ("--tag", "lang"), ("--tag", "draft", "--tag", "lang:en", "--status", "ready", "--max-rank", "4")):
        assert [item["name"] for item in tenant.ok("adapters", "list", *options)] == ["style"]
    for options in (("-q", "corsair"), ("--tag", "team"), ("--min-rank", "5"), ("--base-model", "other")):
        assert tenant.ok("adapters", "list", *options) == []
