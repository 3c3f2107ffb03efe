"""A whole installation as real processes: the registry, workers and a relay over PostgreSQL, Redis and S3, to be broken.

PostgreSQL and S3 are reached through proxies. Every process is ended by its own pid.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import httpx2
from pydantic import SecretStr

from registry.audit.service import record
from registry.config import Settings
from registry.db import Database
from registry.tenants import service as tenants
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import ADMIN, TENANT_SCOPES, KeyHasher
from tests.brokers import RedisServer
from tests.faults.proxy import Proxy
from tests.generate import BASE_NAME
from tests.postgresql import PostgreSQL
from tests.registry.adapters.pushing import write_base_model
from tests.registry.conftest import SECRET_KEY, bearer
from tests.registry.places import Place, make_place, s3_settings
from tests.servers import S3_ADMIN, S3Server, free_ports

ROOT = Path(__file__).resolve().parents[2]
LEASE_S = 1.5
START_S = 90.0


def until(holds: Callable[[], Any], *, what: str | Callable[[], str], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.05)


class Ears:
    """A receiver of webhooks: how often each id came to each path."""

    def __init__(self) -> None:
        heard: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        lock = Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    heard[self.path][self.headers["webhook-id"]] += 1
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.heard = heard
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] - a worker that was killed while it sent
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Plant:
    """`settings`, `database` and `place` look past the proxies. A process has a name; `start` replaces one that is dead."""

    folder: Path
    environment: dict[str, str]
    settings: Settings
    database: Database
    place: Place
    database_proxy: Proxy
    store_proxy: Proxy
    redis: RedisServer
    ears: Ears
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    num_started: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, name: str, *, wait: bool = True, **variables: str) -> subprocess.Popen[bytes]:
        """`api`, `relay`, or any other name for a worker."""
        module = {"api": "registry", "relay": "workers.outbox"}.get(name, "workers")
        self.num_started += 1
        log = self.folder / f"{self.num_started:03}-{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env=self.environment | variables, stdout=out, stderr=out)
        self.processes[name] = process
        if wait and name == "api":
            until(self.is_up, what=lambda: log.read_text()[-3000:], within_s=START_S)
        elif wait and name != "relay":
            until(lambda: b"worker.started" in log.read_bytes(), what=lambda: log.read_text()[-3000:], within_s=START_S)
        return process

    def is_up(self) -> bool:
        """Whether the registry answers."""
        try:
            return httpx2.get(f"{self.url}/livez", timeout=2).status_code == 200
        except httpx2.HTTPError:
            return False

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def stop_all(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def stop_workers(self) -> None:
        for name in [name for name in self.processes if name != "api"]:
            self.kill(name)

    def make_key(self, tenant: str | None, *scopes: str) -> str:
        hasher = KeyHasher(SECRET_KEY)
        with self.database.system_write() as session:
            tenant_id = None if tenant is None else tenants.get_tenant(session, tenant).id
            options: dict[str, Any] = {"expires_at": None, "hasher": hasher, "record": record}
            return tenants.issue_key(session, subject=SYSTEM, tenant_id=tenant_id, name="test", scopes=scopes, **options)[1]

    def make_tenant(self, name: str) -> tuple[str, str]:
        """(id, token of a key that may everything)."""
        with self.database.system_write() as session:
            tenant_id = tenants.create_tenant(session, subject=SYSTEM, name=name, record=record).id
        return tenant_id, self.make_key(name, *sorted(TENANT_SCOPES))

    def client(self, token: str) -> httpx2.Client:
        return httpx2.Client(base_url=f"{self.url}/api/v1", headers=bearer(token), timeout=20, trust_env=False)

    def import_base_model(self, name: str) -> None:
        self.register_base_model(name)
        self.await_base_model(name)

    def register_base_model(self, name: str) -> None:
        folder = write_base_model(self.folder / name, seed=len(name) * 100 + self.num_started)
        source = {"kind": "directory", "location": str(folder)}
        upstream = [BASE_NAME] if name == "tiny" else [name]
        with self.client(self.make_key(None, ADMIN)) as operator:
            answer = operator.post("/base-models", json={"name": name, "source": source, "upstream_names": upstream})
            assert answer.status_code == 202, answer.text

    def await_base_model(self, name: str) -> None:
        with self.client(self.make_key(None, ADMIN)) as operator:
            until(lambda: operator.get(f"/base-models/{name}").json()["status"] == "ready", what=f"{name} is not ready")


@contextmanager
def making_plant(folder: Path, *, postgresql: PostgreSQL, s3: S3Server) -> Iterator[Plant]:
    """Nothing runs yet but the servers."""
    redis, ears = RedisServer(folder / "redis.log"), Ears()
    redis.start()
    with postgresql.installation() as name:
        direct = postgresql.urls(name)
        database_proxy = Proxy(postgresql.dial)
        store_proxy = Proxy(lambda: _dial(s3.endpoint_url))
        database = Database(direct["database_system_url"])
        (port,) = free_ports(1)
        place = make_place(s3)
        urls = {key: value.replace("@/", f"@127.0.0.1:{database_proxy.port}/").partition("?")[0] for key, value in direct.items()}
        plant = Plant(
            folder=folder,
            environment=_environment(folder, urls=urls, place=place, store_port=store_proxy.port, broker=redis.url(), port=port),
            settings=Settings(blob_url=place.url, s3=s3_settings(s3), secret_key=SecretStr(SECRET_KEY), **direct),
            database=database,
            place=place,
            database_proxy=database_proxy,
            store_proxy=store_proxy,
            redis=redis,
            ears=ears,
            port=port,
        )
        try:
            yield plant
        finally:
            plant.stop_all()
            ears.close()
            redis.kill()
            database_proxy.close()
            store_proxy.close()
            database.close()


def _dial(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)))


def _environment(folder: Path, *, urls: dict[str, str], place: Place, store_port: int, broker: str, port: int) -> dict[str, str]:
    ours = {
        "STATE_DIR": str(folder / "state"),
        "SECRET_KEY": SECRET_KEY,
        "DATABASE_URL": urls["database_url"],
        "DATABASE_SYSTEM_URL": urls["database_system_url"],
        "BROKER_URL": broker,
        "BROKER_POLL_S": "0.5",
        "BLOB_URL": place.url,
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{store_port}",
        "S3_ACCESS_KEY_ID": S3_ADMIN[0],
        "S3_SECRET_ACCESS_KEY": S3_ADMIN[1],
        "S3_MAX_ATTEMPTS": "2",
        "PORT": str(port),
        "JOB_LEASE_S": str(LEASE_S),
        "WEBHOOK_POLL_S": "0.1",
        "WEBHOOK_FIRST_RETRY_S": "0.2",
        "OUTBOUND_ALLOW_HTTP": "true",
        "OUTBOUND_ALLOW_HOSTS": "127.0.0.1",
        "HUB_ENDPOINTS": f"http://127.0.0.1:{port}",
        "UPLOAD_PART_BYTES": str(5 << 20),
        "QUOTA_BYTES": str(1 << 40),
        "QUOTA_ADAPTERS": "1000",
    }
    outside = {name: value for name, value in os.environ.items() if not name.startswith("LORARY_")}
    return outside | {f"LORARY_{name}": value for name, value in ours.items()} | {"OMP_NUM_THREADS": "1"}
