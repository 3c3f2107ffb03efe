"""`python -m gpu_runtime` as a process: what it refuses to start with, and how it leaves when told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gpu_runtime.config import RuntimeConfig, prepare_threads
from registry.wire import GRANT_HEADER, Heartbeat, HeartbeatReply, ReplicaRegistration, ReplicaWelcome
from tests.runtime.server.replica import REPLICA_ID, SIGNER, grant, wait_until

ROOT = Path(__file__).resolve().parents[3]


def start(*flags: str, **options: Any) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORARY_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpu_runtime", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def refused(*flags: str) -> str:
    """The one line that a process says when it cannot start."""
    process = start(*flags)
    output, line = process.communicate(timeout=60)
    assert process.returncode == 1, line
    assert output == ""
    assert line.startswith("gpu_runtime: ")
    assert line.count("\n") == 1, line
    return line


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "replica.key"
    path.write_text("lry_id_secret\n")
    return path


def test_settings_that_cannot_work_are_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: Address already in use" in refused("--model-dir", str(tmp_path), "--port", str(port))
    assert "registry_url is 'localhost:8420'; it must begin with http://" in refused(
        "--model-dir", str(tmp_path), "--registry-url", "localhost:8420", "--port", "0"
    )


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, key_file: Path) -> None:
    flags = ["--registry-url", "http://127.0.0.1:9", "--port", "0"]
    assert "lacks config.json, tokenizer.json" in refused("--model-dir", str(tmp_path), "--replica-key-file", str(key_file), *flags)
    key_file.write_text("sk-something")
    assert "keys begin with lry_" in refused("--model-dir", str(tmp_path), "--replica-key-file", str(key_file), *flags)


def test_threads_are_set_before_anything_reads_them() -> None:
    code = "import gpu_runtime.__main__, sys; sys.exit(bool({'torch', 'numba', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    environment: dict[str, str] = {}
    prepare_threads(RuntimeConfig(Path("x"), threads=3), environ=environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": "3", "NUMBA_NUM_THREADS": "3"}
    kept = {"OMP_WAIT_POLICY": "ACTIVE", "THP_MEM_ALLOC_ENABLE": "0"}
    prepare_threads(RuntimeConfig(Path("x")), environ=kept)
    assert kept == {"OMP_WAIT_POLICY": "ACTIVE", "THP_MEM_ALLOC_ENABLE": "0"}, "who sets it knows why"


class ScriptedRegistry(ThreadingHTTPServer):
    """Welcomes any replica and remembers what it reports: the registry's half of the wire, without a registry."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.registrations: list[ReplicaRegistration] = []
        self.heartbeats: list[Heartbeat] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        registry = self.server
        assert isinstance(registry, ScriptedRegistry)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: ReplicaWelcome | HeartbeatReply
        if self.path.endswith("/heartbeat"):
            registry.heartbeats.append(Heartbeat.model_validate_json(body))
            answer = HeartbeatReply(heartbeat_interval_s=0.2, grant_public_keys=SIGNER.public_keys)
        else:
            registry.registrations.append(ReplicaRegistration.model_validate_json(body))
            answer = ReplicaWelcome(
                replica_id=REPLICA_ID,
                base_model="tiny",
                heartbeat_interval_s=0.2,
                grant_public_keys=SIGNER.public_keys,
                grant_leeway_s=5.0,
            )
        content = answer.model_dump_json().encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def scripted_registry() -> Iterator[ScriptedRegistry]:
    registry = ScriptedRegistry()
    thread = threading.Thread(target=registry.serve_forever, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        registry.shutdown()
        registry.server_close()
        thread.join(5)


@contextmanager
def running(model_dir: Path, key_file: Path, registry: ScriptedRegistry, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has registered, and where it listens."""
    flags = ["--model-dir", str(model_dir), "--replica-key-file", str(key_file), "--registry-url", registry.url]
    process = start(*flags, "--port", "0", "--threads", "1", "--pool-bytes", str(16 * 2**20), *more)
    try:
        wait_until(lambda: bool(registry.heartbeats) or process.poll() is not None, within_s=90)
        assert process.poll() is None, process.communicate()[1]
        yield process, registry.registrations[0].url
    finally:
        process.kill()
        process.communicate()


def test_told_to_stop_it_finishes_what_runs_and_exits_0(model_dir: Path, key_file: Path) -> None:
    body = {"model": "m", "prompt": "x", "max_tokens": 2500, "temperature": 0, "ignore_eos": True}
    with scripted_registry() as registry, running(model_dir, key_file, registry) as (process, url), httpx2.Client(trust_env=False) as http:
        assert not url.endswith(":0"), "it registers where it really listens"
        assert http.get(f"{url}/readyz").json()["status"] == "ready"
        with http.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": True}, headers={GRANT_HEADER: grant()}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: registry.heartbeats[-1].state == "draining")
            with httpx2.Client(trust_env=False) as other:
                refused = other.post(f"{url}/v1/completions", json=body, headers={GRANT_HEADER: grant()})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    logged = [json.loads(line) for line in errors.splitlines()]
    assert [one["event"] for one in logged if one["event"].startswith("replica.")][-2:] == ["replica.draining", "replica.stopped"]
    (finished,) = [one for one in logged if one["event"] == "request.finished"]
    assert finished["num_completion_tokens"] == 2500
    assert {"request_id", "tenant", "version_digest", "form_digest", "duration_s", "first_token_s"} <= finished.keys()


def test_what_outlasts_the_drain_is_ended(model_dir: Path, key_file: Path) -> None:
    body = {"model": "m", "prompt": ["x"] * 16, "max_tokens": 4000, "temperature": 0, "ignore_eos": True, "stream": True}
    with (
        scripted_registry() as registry,
        running(model_dir, key_file, registry, "--drain-s", "0") as (process, url),
        httpx2.Client(trust_env=False) as http,
        http.stream("POST", f"{url}/v1/completions", json=body, headers={GRANT_HEADER: grant()}, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        reasons = [line for line in lines if line]
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert not any('"length"' in line for line in reasons), "nobody got all of their tokens"


def test_a_second_signal_ends_it_at_once(model_dir: Path, key_file: Path) -> None:
    body = {"model": "m", "prompt": "x", "max_tokens": 4000, "temperature": 0, "ignore_eos": True, "stream": True}
    with scripted_registry() as registry, running(model_dir, key_file, registry) as (process, url), httpx2.Client(trust_env=False) as http:
        headers = {GRANT_HEADER: grant()}
        with http.stream("POST", f"{url}/v1/completions", json={**body, "prompt": ["x"] * 16}, headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: registry.heartbeats[-1].state == "draining")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=5) == -signal.SIGTERM
