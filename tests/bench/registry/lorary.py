"""Our side: `lorary api` with keys and row-level security on, filled by SQL."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any, ClassVar

import httpx2

from registry.audit.service import record
from registry.base_models.models import READY, BaseModelRevision
from registry.db import Database
from registry.tenants import service
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import TENANT_SCOPES, KeyHasher
from tests.bench.registry.generator import request
from tests.bench.registry.world import PAGE, PYTHON, VERSIONS, World, base_environment, start
from tests.generate import BASE_NAME, generate_adapter, tiny_base
from tests.postgresql import PostgreSQL
from tests.servers import free_ports

SECRET_KEY = "a-secret-key-of-the-benchmark-that-is-long-enough"
NOTES = 200
"""Small files, one of which each pushed version has: what makes its content new."""


class Lorary:
    """The registry as a process. Every client has a key of its own."""

    name = "lorary"
    statuses: ClassVar = {"create version": 201, "alias move": 200, "resolve": 200, "list": 200}

    def __init__(self, server: PostgreSQL, database: str, folder: Path, world: World) -> None:
        self.world = world
        self.port = free_ports(1)[0]
        self._urls = server.urls(database)
        self._folder = folder
        self._tokens = self._fill(server, database)
        self.process: subprocess.Popen[bytes] = self._start()
        self._blobs = self._upload()
        self._pushed: Counter[str] = Counter()

    def _start(self) -> subprocess.Popen[bytes]:
        given = {"STATE_DIR": self._folder, "SECRET_KEY": SECRET_KEY, "PORT": self.port, "API_WORKERS": self.world.workers}
        given |= {name.upper(): value for name, value in self._urls.items()}
        given |= {"DATABASE_PREPARED_STATEMENTS": "true", "DATABASE_POOL_SIZE": 10, "DATABASE_POOL_OVERFLOW": 5}  # as MLflow has them
        environment = base_environment() | {f"LORARY_{name}": str(value) for name, value in given.items()}
        url = f"http://127.0.0.1:{self.port}/livez"
        return start([PYTHON, "-m", "registry"], environment=environment, log=self._folder / "api.log", url=url)

    # ---- what it holds ----

    def _fill(self, server: PostgreSQL, name: str) -> list[str]:
        self._folder.mkdir(exist_ok=True)
        database = Database(server.url(name))
        with database.system_write() as session:
            tenant = service.create_tenant(session, subject=SYSTEM, name="bench", record=record)
            hasher, scopes = KeyHasher(SECRET_KEY), sorted(TENANT_SCOPES)
            made = [
                service.issue_key(
                    session,
                    subject=SYSTEM,
                    tenant_id=tenant.id,
                    name=f"client {n}",
                    scopes=scopes,
                    expires_at=None,
                    hasher=hasher,
                    record=record,
                )
                for n in range(self.world.clients)
            ]
            base = BaseModelRevision(
                name="tiny",
                status=READY,
                base_digest="0" * 64,
                source={},
                location="/nowhere",
                upstream_names=[BASE_NAME],
                spec=tiny_base().to_json(),
            )
            session.add(base)
            session.flush()
            tenant_id, base_id = tenant.id, base.id
        database.close()
        for statement in _rows(tenant_id, base_id, adapters=self.world.adapters):
            server.execute(statement, database=name)
        return [token for _key, token in made]

    def _upload(self) -> dict[str, list[str]]:
        """sha256 of the files that pushes name: config and weights of one adapter, and many notes."""
        files = generate_adapter(tiny_base()).files
        digests = {path: [self._put(data)] for path, data in files.items()}
        digests["README.md"] = [self._put(f"Note {n}".encode()) for n in range(NOTES)]
        return digests

    def _put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        url = f"http://127.0.0.1:{self.port}/api/v1/blobs/{sha256}"
        httpx2.put(url, content=data, headers={"Authorization": f"Bearer {self._tokens[0]}"}).raise_for_status()
        return sha256

    # ---- what is asked of it ----

    def requests(self, operation: str, *, client: int) -> Iterator[bytes]:
        names = self.world.names(client)
        if operation == "create version":
            return (self._push(name, client) for name in names)
        if operation == "alias move":
            return (self._move(name, number, client) for name, number in zip(names, _turns(self.world, client), strict=False))
        if operation == "resolve":
            return (self._request("GET", f"/v1/models/{name}@prod", client) for name in names)
        assert operation == "list", operation
        return cycle([self._request("GET", f"/api/v1/adapters?limit={PAGE}", client)])

    def _push(self, name: str, client: int) -> bytes:
        """Content that the adapter does not have yet, in whichever round."""
        turn = self._pushed[name]
        assert turn < NOTES, f"{name} was pushed {NOTES} times; measure with more adapters or for a shorter time"
        self._pushed[name] += 1
        files = {path: digests[turn % len(digests)] for path, digests in self._blobs.items()}
        return self._request("POST", f"/api/v1/adapters/{name}/versions", client, body={"files": files})

    def _move(self, name: str, number: int, client: int) -> bytes:
        headers = {"If-Match": "*"}
        return self._request("PUT", f"/api/v1/adapters/{name}/aliases/prod", client, body={"version": number}, **headers)

    def follow_requests(self, job_ids: Sequence[str]) -> list[bytes]:
        """An event stream of each job."""
        asked = (self._request("GET", f"/api/v1/jobs/{job_id}/events", n % len(self._tokens)) for n, job_id in enumerate(job_ids))
        return [one.replace(b"Accept: */*", b"Accept: text/event-stream") for one in asked]

    def _request(self, method: str, path: str, client: int, *, body: Any = None, **headers: str) -> bytes:
        return request(method, path, port=self.port, token=self._tokens[client], body=body, **headers)


def _turns(world: World, client: int) -> Iterator[int]:
    """The version to point at: the other one with every round over the client's adapters."""
    share = len(range(client, world.adapters, world.clients))
    return (1 + (1 + step // share) % VERSIONS for step in count())


def _rows(tenant_id: str, base_id: str, *, adapters: int) -> list[str]:
    """SQL that makes `adapters` with two ready versions, their forms and two aliases, as pushes would have."""
    files = [{"path": path, "sha256": "a" * 64, "size": 1000} for path in ("adapter_config.json", "adapter_model.safetensors")]
    manifest, targets = json.dumps({"files": files}), json.dumps(["q_proj", "v_proj"])
    numbers = f"generate_series(0, {adapters - 1}) AS n"
    versions = f"{numbers}, generate_series(1, {VERSIONS}) AS v"
    aliases = f"{numbers}, (VALUES ('default'), ('prod')) AS a(name)"
    return [
        f"""INSERT INTO adapters (id, tenant_id, name, base_model_id, description, tags, created_at, updated_at)
            SELECT md5('a' || n), '{tenant_id}', 'adapter-' || lpad(n::text, 5, '0'), '{base_id}', '', '[]',
                   now() + n * interval '1 ms', now() FROM {numbers}""",
        f"""INSERT INTO adapter_versions (id, tenant_id, adapter_id, number, version_digest, status, base_model_id, manifest, rank,
                   targets, num_params, size_bytes, created_at, created_by)
            SELECT md5('v' || n || '.' || v), '{tenant_id}', md5('a' || n), v, md5('x' || n || '.' || v) || md5('y'), 'ready',
                   '{base_id}', '{manifest}', 8, '{targets}', 1000, 2000, now(), 'bench' FROM {versions}""",
        f"""INSERT INTO forms (id, tenant_id, version_id, kind, form_digest, manifest, size_bytes)
            SELECT md5('f' || n || '.' || v), '{tenant_id}', md5('v' || n || '.' || v), 'raw', md5('z' || n || '.' || v) || md5('y'),
                   '{{"blobs": {{}}}}', 2000 FROM {versions}""",
        f"""INSERT INTO aliases (id, tenant_id, adapter_id, name, version_id, generation, updated_at, updated_by)
            SELECT md5('l' || n || name), '{tenant_id}', md5('a' || n), name, md5('v' || n || '.1'), 1, now(), 'bench' FROM {aliases}""",
        "VACUUM ANALYZE",
    ]
