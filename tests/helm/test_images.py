"""The three Dockerfiles: linted, of files that exist, of dependencies that resolve, for a user without rights."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helm.charts import container, one, rendered
from tests.helm.generate import CHART

ROOT = CHART.parent
IMAGES = ("api", "worker", "runtime")
DOCKERFILES = [CHART / "images" / name / "Dockerfile" for name in IMAGES]
ids = {"ids": IMAGES}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, **ids)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    done = subprocess.run([str(Path(sys.executable).with_name("hadolint")), str(dockerfile)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, **ids)
def test_everything_that_is_copied_exists_and_is_not_ignored(dockerfile: Path) -> None:
    ignored = (dockerfile.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    sources = [source for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE) for source in line.split()]
    assert {"registry", "workers", "gpu_runtime", "migrations", "pyproject.toml", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, **ids)
def test_what_is_installed_is_pinned_and_exists(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    installs = re.findall(r"pip install (.+)$", text, re.MULTILINE)
    assert installs
    assert all(arguments.startswith("-c constraints.txt ") for arguments in installs)
    assert not re.search(r"https?://|index-url", text), "which index a build uses is for the builder to say"
    extras = re.search(r'"\.(?:\[([a-z,]+)\])?"', installs[-1])
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set((extras[1] or "").split(",")) - {""} <= known.keys()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, **ids)
def test_it_runs_as_the_user_of_the_chart_and_every_stage_names_its_base(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    pod = one(rendered("production"), "Deployment", "-api")["spec"]["template"]["spec"]
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in text
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["python:3.11-slim-bookworm"] * 2
    mounts = {mount["mountPath"] for mount in container(one(rendered("production"), "Deployment", "-api"), "api")["volumeMounts"]}
    assert {"/var/lib/lorary", "/tmp"} <= mounts
    assert "LORARY_STATE_DIR=/var/lib/lorary" in text


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_registry_s_image_is_whole_and_has_no_torch(tmp_path: Path) -> None:
    """Its pip line in a fresh environment, from copied files alone; then the commands that pods run."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "lorary")], check=True)
    source = tmp_path / "src"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILES[0].read_text(), re.MULTILINE)
    for name in (part for line in copied for part in line.split()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    scripts = tmp_path / "lorary" / "bin"
    pip = [str(scripts / "pip"), "install", "-q", "--disable-pip-version-check", "-c", "constraints.txt", ".[otel]"]
    subprocess.run(pip, cwd=source, check=True, capture_output=True)
    installed = subprocess.run([str(scripts / "pip"), "freeze"], check=True, capture_output=True, text=True).stdout
    assert "torch" not in installed
    environment = {"PATH": str(scripts), "HOME": str(tmp_path), "LORARY_STATE_DIR": str(tmp_path / "state")}

    def lorary(*arguments: str) -> str:
        done = subprocess.run(
            [str(scripts / "lorary"), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert lorary("keys", "generate").startswith("lry_")
    assert '"admin_key": "lry_' in lorary("db", "init", "-o", "json")
    assert "revision" in lorary("db", "wait", "--timeout", "5")
    assert "lorary" in lorary("--version")
