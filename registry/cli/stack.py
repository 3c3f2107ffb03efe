"""Lorary's parts as programs of one supervisor in one state directory: what `lorary up` starts, in which order, and how.

api       -> healthy
worker    -> imports the base models that were asked for
runtime.NAME, one a served base model -> live at the registry
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from registry.cli import base_models
from registry.cli.client import ApiProblem, Json, RegistryClient, path
from registry.cli.failure import CliFailure
from registry.cli.ports import free_port, reachable
from registry.cli.secrets_file import read_secret, write_secret
from registry.cli.state import ChildState, UpState, write_up
from registry.cli.supervisor import Child, Program, Supervisor
from registry.config import Settings, child_environment

API_START_S = 60.0
IMPORT_S = 1800.0
RUNTIME_START_S = 300.0
WORKER_NICENESS = 10
API_RANK, WORKER_RANK, RUNTIME_RANK = 0, 1, 2


@dataclass(frozen=True)
class Wanted:
    """What was asked for. `sources` is name -> where a base model comes from; `models` empty serves those, or the only one."""

    sources: Mapping[str, str]
    upstream_names: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()


class Stack:
    """The running parts."""

    def __init__(
        self,
        settings: Settings,
        *,
        wanted: Wanted,
        supervisor: Supervisor,
        mint_admin_key: Callable[[], str],
        tell: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.models = wanted.models or tuple(wanted.sources)
        self._wanted = wanted
        self.url = f"http://{reachable(settings.host)}:{settings.port}"
        self._supervisor = supervisor
        self._mint_admin_key = mint_admin_key
        self._tell = tell
        self._client = RegistryClient(self.url, request_id=supervisor.poll_id)
        self._last_trouble = ""

    def start(self) -> None:
        """Bring up everything, importing base models first. Raises as `Supervisor.wait_until`."""
        self._supervisor.on_change = self._record
        self._start_api()
        self._supervisor.add(self._worker())
        for name, source in self._wanted.sources.items():
            self._register(name, source)
        for name in self.models:
            self._await_import(name)
        for model in self._choose():
            self._await_runtime(self._start_runtime(model))

    def tick(self) -> None:
        """Serve the base model that became ready since, where none is served so far."""
        if self.served():
            return
        try:
            for model in self._choose():
                self._start_runtime(model)
        except CliFailure as failure:  # the registry restarts, or there are several now: the next tick asks again
            if failure.detail != self._last_trouble:
                self._tell(failure.detail)
            self._last_trouble = failure.detail

    def served(self) -> list[str]:
        return [child.program.name.removeprefix("runtime.") for child in self._supervisor.children if child.program.rank == RUNTIME_RANK]

    def state(self) -> UpState:
        return UpState(pid=os.getpid(), url=self.url, children=tuple(_child_state(child) for child in self._supervisor.children))

    def close(self) -> None:
        self._client.close()

    def _record(self) -> None:
        try:
            write_up(self.settings.state_dir, self.state())
        except OSError as error:  # a full disk takes away what `doctor` reads, not the service
            self._tell(f"cannot write up.json: {error.strerror}")

    # ---- the api and the worker ----

    def _start_api(self) -> None:
        api = self._supervisor.add(self._api())
        self._supervisor.wait_until(lambda: _healthy(self._client), timeout_s=API_START_S, what="the api", child=api)
        token = self._key("supervisor", make=self._mint_admin_key)
        self._client.close()
        self._client = RegistryClient(self.url, token=token, timeout_s=10.0, request_id=self._supervisor.poll_id)

    def _api(self) -> Program:
        environment = child_environment(**self._common(), LORARY_HOST=self.settings.host, LORARY_PORT=str(self.settings.port))
        return Program(name="api", command=_module("registry"), environment=environment, rank=API_RANK, url=self.url, stop_timeout_s=15.0)

    def _worker(self) -> Program:
        """One thread at low priority: a job never slows the replies of the runtime next to it (DESIGN 4)."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
        return Program(
            name="worker",
            command=_module("workers"),
            environment=child_environment(
                **self._common(), **threads, OMP_WAIT_POLICY="PASSIVE", LORARY_METRICS_PORT=str(self._worker_metrics_port)
            ),
            rank=WORKER_RANK,
            niceness=WORKER_NICENESS,
            stop_timeout_s=20.0,
        )

    def _common(self) -> dict[str, str]:
        public = self.settings.public_url if "public_url" in self.settings.model_fields_set else self.url
        return {
            "LORARY_STATE_DIR": str(self.settings.state_dir),
            "LORARY_PUBLIC_URL": public,
            "LORARY_LOG_FORMAT": self.settings.log_format,
        }

    @property
    def _worker_metrics_port(self) -> int:
        """The one after those of the api's processes: two on one machine cannot share it."""
        return self.settings.metrics_port and self.settings.metrics_port + self.settings.api_workers

    # ---- base models ----

    def _register(self, name: str, source: str) -> None:
        """Ask for a base model that is not there yet, or whose import failed before."""
        known = self._base_model(name)
        if known is None or known["status"] == "failed":
            upstream = [upstream for model, upstream in self._wanted.upstream_names if model == name]
            base_models.register(self._client, name, source, upstream_names=upstream)
            self._tell(f"importing base model {name} from {source}")
        elif {field: known["source"][field] for field in ("kind", "location")} != base_models.parse_source(source):
            raise CliFailure(
                f"base model {name} was registered from another source",
                remedy="give the new source another name, or leave --base-model out",
                registered=known["source"]["location"],
                asked=source,
            )

    def _await_import(self, name: str) -> None:
        model = self._base_model(name)
        if model is None:
            raise CliFailure(f"there is no base model {name}", remedy=f"start with --base-model {name}=SOURCE", field="--model")

        def settled() -> bool:
            nonlocal model
            model = self._base_model(name) or model
            return model is not None and model["status"] != "pending"

        self._supervisor.wait_until(_tolerant(settled), timeout_s=IMPORT_S, what=f"the import of {name}")
        base_models.fail_unless_ready(model)

    def _base_model(self, name: str) -> Json | None:
        try:
            return self._client.get(path("base-models", name))
        except ApiProblem as problem:
            if problem.status == 404:
                return None
            raise

    def _choose(self) -> list[Json]:
        """The base models to serve now: those named, or the only ready one, or none yet."""
        ready = [model for model in self._client.pages("/base-models") if model["status"] == "ready"]
        if self.models:
            return [model for model in ready if model["name"] in self.models]
        if len(ready) > 1:
            raise CliFailure(
                f"several base models are ready: {', '.join(sorted(m['name'] for m in ready))}", remedy="choose with --model NAME"
            )
        return ready

    # ---- runtimes ----

    def _start_runtime(self, model: Json) -> Child:
        return self._supervisor.add(self._runtime(model))

    def _await_runtime(self, child: Child) -> None:
        live = _tolerant(
            lambda: any(replica["url"] == child.program.url and replica["live"] for replica in self._client.pages("/replicas"))
        )
        self._supervisor.wait_until(live, timeout_s=RUNTIME_START_S, what=child.program.name, child=child)

    def _runtime(self, model: Json) -> Program:
        name, port = model["name"], free_port("127.0.0.1")
        self._key(f"replica-{name}", make=lambda: self._make_replica_key(name))
        flags = {
            "--model-dir": model["location"],
            "--registry-url": self.url,
            "--replica-key-file": str(self._key_file(f"replica-{name}")),
            "--host": "127.0.0.1",
            "--port": str(port),
            "--disk-cache-dir": str(self.settings.state_dir / "cache" / name),
        }
        return Program(
            name=f"runtime.{name}",
            command=_module("gpu_runtime", *(part for flag in flags.items() for part in flag)),
            environment=child_environment(**self._common(), OMP_WAIT_POLICY="PASSIVE"),
            rank=RUNTIME_RANK,
            url=f"http://127.0.0.1:{port}",
            stop_timeout_s=30.0,
        )

    def _make_replica_key(self, model: str) -> str:
        return str(self._client.post("/keys", {"name": f"replica of {model}, made by lorary up", "scopes": ["replica"]})["token"])

    # ---- keys of our own ----

    def _key(self, name: str, *, make: Callable[[], str]) -> str:
        """The key kept under `name`, or a new one where there is none or the registry refuses it."""
        kept = (read_secret(self._key_file(name)) or "").strip()
        if kept and _accepted(self.url, kept):
            return kept
        token = make()
        write_secret(self._key_file(name), token + "\n")
        return token

    def _key_file(self, name: str) -> Path:
        return self.settings.state_dir / "keys" / f"{name}.key"


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def _healthy(client: RegistryClient) -> bool:
    try:
        status, _body = client.probe("/readyz")
    except CliFailure:
        return False
    return status == 200


def _accepted(url: str, token: str) -> bool:
    with RegistryClient(url, token=token) as client:
        try:
            client.get("/whoami")
        except ApiProblem as problem:
            if problem.status == 401:
                return False
            raise
    return True


def _tolerant(condition: Callable[[], bool]) -> Callable[[], bool]:
    """A registry that restarts meanwhile means "not yet"."""

    def holds() -> bool:
        try:
            return condition()
        except CliFailure:
            return False

    return holds


def _child_state(child: Child) -> ChildState:
    process = child.process
    return ChildState(
        name=child.program.name, pid=None if process is None else process.pid, url=child.program.url, num_restarts=child.num_restarts
    )
