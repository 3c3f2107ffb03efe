"""A machine that does with rendered manifests what a kubelet would: init containers in turn, then the container, its variables and files.

No images: the programs are this checkout's. Addresses and folders of a cluster are replaced by this machine's; nothing else is.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helm.charts import Manifest, containers, secret_files, variables
from tests.helm.generate import CHART
from tests.servers import free_ports

RESTART_S = 1.0


class Pod:
    """One pod of a workload, in a thread. `code` is the exit status of a pod that ended."""

    def __init__(self, spec: Manifest, *, folder: Path, secrets: Mapping[str, str], replaced: Mapping[str, str]) -> None:
        self.spec = spec
        self.ports = {port["name"]: number for port, number in zip(_ports(spec), free_ports(len(_ports(spec))), strict=True)}
        self.code: int | None = None
        self.replaced = {**replaced, **self._places(folder)}
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._write_secrets(folder / "secrets", secrets)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _places(self, folder: Path) -> dict[str, str]:
        places = {"/var/lib/lorary": "state", "/run/secrets/lorary": "secrets", "/var/cache/lorary": "cache", "/tmp": "tmp"}
        for name in places.values():
            (folder / name).mkdir(parents=True)
        return {path: str(folder / name) for path, name in places.items()}

    def _write_secrets(self, folder: Path, secrets: Mapping[str, str]) -> None:
        for name, source in secret_files(self.spec).items():
            (folder / name).write_text(secrets[source])

    def _run(self) -> None:
        for each in containers(self.spec):
            self.code = self._until_it_ends(each)

    def _until_it_ends(self, container: Manifest) -> int:
        """As often as it takes, where the pod says so: RestartPolicy Always and OnFailure alike, while it fails."""
        while True:
            code = self._once(container)
            if code == 0 or self._stopping.is_set() or self.spec.get("restartPolicy") == "Never":
                return code
            time.sleep(RESTART_S)

    def _once(self, container: Manifest) -> int:
        arguments = [self._here(text) for text in container["args"]]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "registry.cli", *arguments], env=self._environment(container), stdout=log, stderr=log
            )
        return self._process.wait()

    def _environment(self, container: Manifest) -> dict[str, str]:
        given = {name: self._here(value) for name, value in variables(container).items() if isinstance(value, str)}
        numbers = {"LORARY_PORT": "http", "LORARY_RUNTIME_PORT": "http", "LORARY_METRICS_PORT": "metrics"}
        given |= {name: str(self.ports[port]) for name, port in numbers.items() if name in given}
        if "LORARY_RUNTIME_PUBLIC_URL" in given:
            given["LORARY_RUNTIME_PUBLIC_URL"] = f"http://127.0.0.1:{self.ports['http']}"
        kept = {name: os.environ[name] for name in ("PATH", "NUMBA_CACHE_DIR") if name in os.environ}
        return {**given, **kept, "PYTHONPATH": str(CHART.parent)}

    def _here(self, text: str) -> str:
        """In one pass: what replaces a folder is itself below one that would be replaced."""
        known = sorted(self.replaced, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, known)), lambda found: self.replaced[found[0]], text)

    @property
    def has_begun(self) -> bool:
        return self._log.exists()

    def log(self) -> str:
        return self._log.read_text()

    def terminate(self) -> float:
        """As a kubelet does; how long it took. Fails where the grace period was too short."""
        self._stopping.set()
        began = time.monotonic()
        assert self._process is not None, "it never started"
        self._process.send_signal(signal.SIGTERM)
        try:
            self._thread.join(timeout=self.spec["terminationGracePeriodSeconds"])
            assert not self._thread.is_alive(), f"longer than its grace period: {self.log()[-2000:]}"
        finally:
            self.kill()
        return time.monotonic() - began

    def kill(self) -> None:
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def wait(self, *, timeout_s: float) -> int | None:
        self._thread.join(timeout=timeout_s)
        return None if self._thread.is_alive() else self.code


def _ports(spec: Manifest) -> list[dict[str, Any]]:
    ports: list[dict[str, Any]] = spec["containers"][0].get("ports", [])
    return ports
