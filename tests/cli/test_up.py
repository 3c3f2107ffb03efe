"""`lorary up` as a whole: real processes in one state directory, killed, stopped and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from registry.cli.credentials import credentials_file
from registry.cli.main import main
from registry.cli.state import read_up, up_file
from tests.cli.test_supervisor import assert_gone
from tests.generate import BASE_NAME

START_S = 120


@dataclass
class Up:
    """One `lorary up -o json`, and the command beside it in another terminal, which knows only the state directory."""

    state_dir: Path
    process: subprocess.Popen[str]
    said: list[dict[str, Any]]
    log: Path

    @property
    def url(self) -> str:
        return str(self.said[-1]["url"])

    def pids(self) -> dict[str, int]:
        state = json.loads(up_file(self.state_dir).read_text())
        return {child["name"]: child["pid"] for child in state["children"]}

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command(self.state_dir, *arguments)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


def environment(state_dir: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LORARY_")}
    return ours | {"LORARY_STATE_DIR": str(state_dir), "LORARY_JOB_POLL_S": "0.1", "OMP_NUM_THREADS": "1"}


def command(state_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "registry.cli", *arguments],
        env=environment(state_dir),
        check=False,
        capture_output=True,
        text=True,
        timeout=START_S,
    )


@contextlib.contextmanager
def starting(state_dir: Path, *arguments: str) -> Iterator[Up]:
    """Start `up`, wait until it says that it is ready; whatever the test leaves running is killed."""
    log = state_dir.with_suffix(".log")
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "registry.cli", "up", "-o", "json", *arguments],
            env=environment(state_dir),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        yield Up(state_dir, process, _until_ready(process, log), log)
    finally:
        process.kill()
        assert process.stdout is not None
        process.stdout.close()
        process.wait()


def _until_ready(process: subprocess.Popen[str], log: Path) -> list[dict[str, Any]]:
    assert process.stdout is not None
    said: list[dict[str, Any]] = []
    for line in process.stdout:
        said.append(json.loads(line))
        if "url" in said[-1]:
            return said
    raise AssertionError(f"lorary up ended with {process.wait()}\n{log.read_text()}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with starting(tmp_path_factory.mktemp("up") / "state", "--port", "0") as up:
        yield up


def test_the_first_start_makes_an_installation_that_the_command_finds(shared: Up) -> None:
    assert [set(line) for line in shared.said] == [{"admin_key"}, {"url", "openai_base_url", "base_models", "state_dir"}]
    assert json.loads(shared.cli("keys", "whoami", "-o", "json").stdout)["scopes"] == ["admin"]
    assert shared.said[0]["admin_key"] not in shared.log.read_text(), "a secret reached the log"
    for file in (credentials_file(shared.state_dir), shared.state_dir / "secret.key", shared.state_dir / "keys" / "supervisor.key"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(shared.state_dir.stat().st_mode) == 0o700


def test_a_second_supervisor_on_the_state_directory_is_refused(shared: Up) -> None:
    done = shared.cli("up", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"another `lorary up` (pid {shared.process.pid})" in done.stderr


def test_workers_run_at_low_priority_and_with_one_thread(shared: Up) -> None:
    worker = psutil.Process(shared.pids()["worker"])
    assert worker.nice() == min(19, psutil.Process(shared.process.pid).nice() + 10)
    assert worker.environ()["OMP_NUM_THREADS"] == "1"


def test_a_killed_api_comes_back_at_the_same_address(shared: Up) -> None:
    before = shared.pids()
    os.kill(before["api"], signal.SIGKILL)
    deadline = time.monotonic() + START_S
    while not _answers(shared.url) or shared.pids()["api"] in (None, before["api"]):
        assert time.monotonic() < deadline, shared.log.read_text()
        time.sleep(0.1)
    assert shared.pids()["worker"] == before["worker"]
    assert "api ended with signal SIGKILL" in shared.log.read_text()


def test_doctor_finds_the_installation_sound_and_tells_of_restarts(shared: Up) -> None:
    done = shared.cli("doctor", "-o", "json", "--blobs", "all")
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert {name: finding["status"] for name, finding in findings.items()} == {
        "state directory": "ok",
        "secret key": "ok",
        "credentials": "ok",
        "disk space": "ok",
        "database schema": "ok",
        "blobs": "ok",
        "garbage": "ok",
        "secrets": "ok",
        "supervisor": "warning",
        "api": "ok",
        "replicas": "warning",
    }
    assert "1 restarts" in findings["supervisor"]["detail"]


def test_sigterm_ends_everything_and_the_next_starts_find_or_replace_their_keys(shared: Up) -> None:
    pids = [shared.process.pid, *shared.pids().values()]
    keys = (shared.state_dir / "keys" / "supervisor.key").read_text()
    assert shared.stop() == 0
    for pid in pids:
        assert_gone(pid)
    assert not up_file(shared.state_dir).exists()
    assert read_up(shared.state_dir) is None
    with starting(shared.state_dir, "--port", "0") as again:
        assert "admin_key" not in again.said[0], "the first key is told once"
        assert again.url != shared.url
        assert again.cli("keys", "whoami").returncode == 0, "the stored key follows the port"
        assert (again.state_dir / "keys" / "supervisor.key").read_text() == keys
        assert again.cli("keys", "revoke", keys.split("_")[1], "--yes").returncode == 0
        assert again.stop(signal.SIGINT) == 0
    with starting(shared.state_dir, "--port", "0") as third:
        assert (third.state_dir / "keys" / "supervisor.key").read_text() != keys, "a revoked key is replaced"
        assert third.stop() == 0


def test_a_base_model_that_is_added_later_gets_its_replica_which_dies_with_the_supervisor(tmp_path: Path, tiny_model_dir: Path) -> None:
    with starting(tmp_path / "state", "--port", "0") as up:
        assert up.said[-1]["base_models"] == []
        added = up.cli("base-models", "add", "tiny", str(tiny_model_dir), "--upstream-name", BASE_NAME)
        assert added.returncode == 0, added.stderr
        _until_served(up)
        assert stat.S_IMODE((up.state_dir / "keys" / "replica-tiny.key").stat().st_mode) == 0o600
        runtime = psutil.Process(up.pids()["runtime.tiny"])
        assert runtime.environ()["OMP_WAIT_POLICY"] == "PASSIVE"
        assert not any("lry_" in word for word in runtime.cmdline()), "a key is on a command line"
        pids = list(up.pids().values())
        up.process.kill()
        up.process.wait()
        if sys.platform == "linux":
            for pid in pids:
                assert_gone(pid)


def _until_served(up: Up) -> None:
    deadline = time.monotonic() + START_S
    while True:
        findings = {finding["check"]: finding["status"] for finding in json.loads(up.cli("doctor", "-o", "json").stdout)}
        if findings["replicas"] == "ok":
            return
        assert time.monotonic() < deadline, up.log.read_text()
        time.sleep(1)


def test_a_base_model_that_is_not_there_cannot_be_served(tmp_path: Path) -> None:
    done = command(tmp_path / "state", "up", "--port", "0", "--model", "unknown")
    assert done.returncode == 1
    assert "there is no base model unknown" in done.stderr


def test_a_base_model_that_cannot_be_imported_ends_the_start_and_leaves_nothing(tmp_path: Path) -> None:
    done = command(tmp_path / "state", "up", "--port", "0", "--base-model", f"nothing={tmp_path}")
    assert done.returncode == 1
    assert "base model nothing could not be imported" in done.stderr
    assert not up_file(tmp_path / "state").exists()
    assert not [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("LORARY_STATE_DIR") == str(tmp_path / "state")
    ]


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command(tmp_path / "state", "up", "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / "state" / "lorary.sqlite3").exists()


@pytest.mark.parametrize("text", ["smollm2", "=x", "smollm2="])
def test_a_base_model_without_a_source_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["up", "--base-model", text])
    assert end.value.code == 2
    assert "--base-model" in capsys.readouterr().err


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(f"{url}/readyz", trust_env=False, timeout=5).status_code == 200
    return False
