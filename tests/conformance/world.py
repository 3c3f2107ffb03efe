"""What the conformance run finds in a registry: a tenant that has one of everything, a neighbour, and keys of several kinds."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import migrations
from registry.audit.service import record
from registry.config import Settings
from registry.db import Database
from registry.tenants import service
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import ADMIN, TENANT_SCOPES, KeyHasher
from registry.tenants.limits import TENANT_WIDE_SCOPES
from tests.generate import BASE_NAME, generate_adapter, tiny_base
from tests.registry.adapters.pushing import write_base_model

OWNER, NEIGHBOUR = "acme", "globex"
HIDDEN = "veiled"
"""The name of the owner's adapter, secret and signing key."""
PREFIX = "own-"
MARKER = "a sentence that only the owner has written"
MADE_BY_SERVER = ("key_id", "job_id", "upload_id", "webhook_id", "delivery_id", "revision")
"""Identifiers that nobody else can have given to a thing of their own."""
READY_S = 120.0


@dataclass(frozen=True)
class Keys:
    """Tokens: the owner's, one of the owner's that is limited to adapters beginning with `PREFIX`, a neighbour's, an admin's."""

    owner: str
    limited: str
    neighbour: str
    admin: str


@dataclass(frozen=True)
class Known:
    """Identifiers of the owner's things, by the name of the parameter that takes them."""

    parameters: Mapping[str, str]

    def but(self, *names: str) -> dict[str, str]:
        """Those that a caller must not be able to tell from identifiers of nothing, except `names`."""
        return {name: value for name, value in self.parameters.items() if name not in names}


def prepare(settings: Settings) -> Keys:
    """Two tenants and their keys in a new database."""
    migrations.upgrade(settings.resolved_database_url)
    database, hasher = Database(settings.resolved_database_url), KeyHasher(settings.secret_key.get_secret_value())
    with database.system_write() as session:
        owner, neighbour = (service.create_tenant(session, subject=SYSTEM, name=name, record=record).id for name in (OWNER, NEIGHBOUR))

        def issue(tenant_id: str | None, *scopes: str, prefixes: list[str] | None = None) -> str:
            limits: dict[str, Any] = {"expires_at": None, "adapter_prefixes": prefixes}
            who = {"subject": SYSTEM, "tenant_id": tenant_id, "name": "conformance"}
            return service.issue_key(session, **who, scopes=sorted(scopes), **limits, hasher=hasher, record=record)[1]

        keys = Keys(
            owner=issue(owner, *TENANT_SCOPES),
            limited=issue(owner, *(TENANT_SCOPES - TENANT_WIDE_SCOPES), prefixes=[PREFIX]),
            neighbour=issue(neighbour, *TENANT_SCOPES),
            admin=issue(None, ADMIN),
        )
    database.close()
    return keys


def fill(url: str, keys: Keys, *, folder: Path) -> Known:
    """One of everything for the owner, over HTTP, with the worker that runs beside; an adapter for the neighbour."""
    _base_model(url, keys.admin, folder=folder)
    with _client(url, keys.neighbour) as neighbour:
        _push(neighbour, "own-one", seed=1)
    with _client(url, keys.owner) as owner:
        files = _push(owner, HIDDEN, seed=2)
        _push(owner, "own-one", seed=3)
        _say(owner.put(f"/adapters/{HIDDEN}/aliases/prod", json={"version": 1}, headers={"If-None-Match": "*"}))
        _say(owner.patch(f"/adapters/{HIDDEN}", json={"description": MARKER}))
        _say(owner.put(f"/secrets/{HIDDEN}", json={"value": "hf_secret"}))
        _say(owner.post("/signing-keys", json={"name": HIDDEN, "public_key": _public_key()}))
        hook = _say(owner.post("/webhooks", json={"url": "https://receiver.example/hook", "event_types": ["key.revoked"]}))["id"]
        ids = {
            "key_id": _say(owner.post("/keys", json={"name": "spare", "scopes": ["adapters:read"]}))["id"],
            "job_id": _say(owner.get("/jobs"))["items"][0]["id"],
            "upload_id": _say(owner.post("/uploads", json={"sha256": "cd" * 32, "size": 5}))["id"],
            "webhook_id": hook,
            "delivery_id": _say(owner.post(f"/webhooks/{hook}/ping"))["id"],
            "sha256": files["adapter_model.safetensors"],
            "revision": _say(owner.get(f"/adapters/{HIDDEN}/versions/1"))["version_digest"],
        }
    names = {"tenant": OWNER, "adapter": HIDDEN, "model": HIDDEN, "name": HIDDEN}
    fixed = {"alias": "prod", "number": "1", "path": "adapter_config.json"}
    return Known(names | fixed | ids)


def _client(url: str, token: str) -> httpx2.Client:
    return httpx2.Client(base_url=f"{url}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=60)


def _say(response: httpx2.Response) -> Any:
    assert response.is_success, f"{response.request.method} {response.request.url}: {response.status_code} {response.text}"
    return response.json() if response.content else None


def _base_model(url: str, token: str, *, folder: Path) -> None:
    source = {"kind": "directory", "location": str(write_base_model(folder / "tiny"))}
    with _client(url, token) as admin:
        _say(admin.post("/base-models", json={"name": "tiny", "source": source, "upstream_names": [BASE_NAME]}))
        _wait(lambda: _say(admin.get("/base-models/tiny"))["status"])


def _push(client: httpx2.Client, name: str, *, seed: int) -> dict[str, str]:
    """{path: sha256} of a version that is ready."""
    files = {}
    for path, data in generate_adapter(tiny_base(), seed=seed).files.items():
        files[path] = hashlib.sha256(data).hexdigest()
        _say(client.put(f"/blobs/{files[path]}", content=data))
    _say(client.post(f"/adapters/{name}/versions", json={"files": files}))
    _wait(lambda: _say(client.get(f"/adapters/{name}/versions/1"))["status"])
    return files


def _wait(status: Any) -> None:
    deadline = time.monotonic() + READY_S
    while (now := status()) != "ready":
        assert time.monotonic() < deadline, f"still {now}"
        time.sleep(0.1)


def _public_key() -> str:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
