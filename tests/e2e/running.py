"""A whole Lorary in real processes: `lorary up` in its own state directory, and clients that talk to it over loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI

from registry.tenants.keys import TENANT_SCOPES

START_S = 300
UPSTREAM = "{}=HuggingFaceTB/SmolLM2-135M-Instruct"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Lorary:
    """One running system. `cli` and `http` act as the first admin unless another key is given."""

    state_dir: Path
    url: str
    admin_key: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str] = field(default_factory=dict)

    def cli(self, *arguments: str, key: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = self.environment | {"LORARY_URL": self.url, "LORARY_API_KEY": key or self.admin_key}
        done = subprocess.run(
            [sys.executable, "-m", "registry.cli", *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"lorary {' '.join(arguments)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def cli_json(self, *arguments: str, key: str | None = None) -> Any:
        return json.loads(self.cli(*arguments, "-o", "json", key=key).stdout)

    def http(self, key: str | None = None, *, tenant: str | None = None) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {key or self.admin_key}"}
        if tenant:
            headers["X-Lorary-Tenant"] = tenant
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    def openai(self, key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def make_tenant(self, name: str, *scopes: str) -> str:
        """A new tenant and the token of its first key."""
        with self.http() as client:
            client.post("/api/v1/tenants", json={"name": name}).raise_for_status()
        return self.make_key(name, *scopes)

    def make_key(self, tenant: str, *scopes: str) -> str:
        wanted = scopes or sorted(TENANT_SCOPES)
        with self.http(tenant=tenant) as client:
            made = client.post("/api/v1/keys", json={"name": "test", "scopes": list(wanted)})
            made.raise_for_status()
            return str(made.json()["token"])

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def environment_without_lorary() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("LORARY_")}


def initialise(state_dir: Path) -> str:
    """`lorary db init`: returns the first admin key, which it prints once."""
    environment = environment_without_lorary() | {"LORARY_STATE_DIR": str(state_dir)}
    done = subprocess.run(
        [sys.executable, "-m", "registry.cli", "db", "init", "-o", "json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"db init ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return str(json.loads(done.stdout)["admin_key"])


@contextlib.contextmanager
def running(state_dir: Path, *, base_model: str, admin_key: str | None = None, settings: dict[str, str] | None = None) -> Iterator[Lorary]:
    """Start, wait until a chat could be answered, stop. `base_model` is NAME=SOURCE; without a key the state is new."""
    admin_key = admin_key or initialise(state_dir)
    port = free_port()
    environment = environment_without_lorary() | {"LORARY_STATE_DIR": str(state_dir), "LORARY_PORT": str(port)} | (settings or {})
    log = (state_dir / "up.log").open("wb")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "registry.cli",
            "up",
            "--base-model",
            base_model,
            "--upstream-name",
            UPSTREAM.format(base_model.partition("=")[0]),
        ],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    lorary = Lorary(state_dir, f"http://127.0.0.1:{port}", admin_key, process, environment)
    try:
        wait_until_ready(lorary, base_model.partition("=")[0])
        yield lorary
    finally:
        lorary.stop()
        log.close()


def wait_until_ready(lorary: Lorary, base_model: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if lorary.process.poll() is not None:
            raise AssertionError(f"lorary up ended with {lorary.process.returncode}\n{(lorary.state_dir / 'up.log').read_text()[-4000:]}")
        with contextlib.suppress(httpx2.HTTPError), lorary.http() as client:
            replicas = client.get("/api/v1/replicas")
            if replicas.status_code == httpx2.codes.OK and any(replica["live"] for replica in replicas.json()["items"]):
                return
        time.sleep(0.2)
    raise AssertionError(f"no live replica of {base_model} after {START_S} s\n{(lorary.state_dir / 'up.log').read_text()[-4000:]}")
