"""Tenant A against every endpoint with tenant B's names and ids: what exists and is not mine looks like what never was.

The table below must name every operation of the OpenAPI document; a new route without a row fails the test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import pytest

from tests.e2e.running import Lorary
from tests.e2e.test_main_job import ADAPTERS, push

pytestmark = pytest.mark.model
JSON = dict[str, Any]
ABSENT_DIGEST = "ab" * 32


@dataclass(frozen=True)
class World:
    """Identifiers of tenant B (`theirs`) or of nothing at all (`nothing`), to be substituted into a path and a body."""

    tenant: str
    adapter: str
    alias: str
    number: str
    path: str
    sha256: str
    key_id: str
    job_id: str
    replica_id: str
    model: str
    name: str
    webhook_id: str = "0" * 32
    delivery_id: str = "1" * 32
    revision: str = "default"
    upload_id: str = "0" * 32


# operation -> kind of rule, and a body where one is needed
OWNED = "owned"  # theirs == nothing, both refused
LISTING = "listing"  # answers, and shows nothing of theirs
ADMIN = "admin"  # a tenant's key is refused whatever it names
REPLICA = "replica"  # only a replica's key may
MINE = "mine"  # acts inside the caller's tenant by construction
PUBLIC = "public"  # no key needed

TABLE: dict[str, tuple[str, JSON | None]] = {
    "GET /livez": (PUBLIC, None),
    "GET /readyz": (PUBLIC, None),
    "GET /api/v1/whoami": (LISTING, None),
    "GET /api/v1/tenants": (ADMIN, None),
    "POST /api/v1/tenants": (ADMIN, {"name": "taken-over"}),
    "GET /api/v1/tenants/{name}": (ADMIN, None),
    "DELETE /api/v1/tenants/{name}": (ADMIN, None),
    "GET /api/v1/usage": (LISTING, None),
    "GET /api/v1/quota": (LISTING, None),
    "GET /api/v1/tenants/{name}/quota": (ADMIN, None),
    "PATCH /api/v1/tenants/{name}/quota": (ADMIN, {"bytes": "unlimited"}),
    "POST /api/v1/tenants/{name}/restore": (ADMIN, None),
    "POST /api/v1/tenants/{name}/purge": (ADMIN, None),
    "POST /api/v1/gc": (ADMIN, {"dry_run": True}),
    "GET /api/v1/gc": (ADMIN, None),
    "GET /api/v1/gc/{job_id}": (ADMIN, None),
    "GET /api/v1/keys": (LISTING, None),
    "POST /api/v1/keys": (MINE, None),
    "DELETE /api/v1/keys/{key_id}": (OWNED, None),
    "POST /api/v1/keys/{key_id}/rotate": (OWNED, {}),
    "GET /api/v1/audit": (LISTING, None),
    "GET /api/v1/audit/export": (LISTING, None),
    "GET /api/v1/webhooks": (LISTING, None),
    "POST /api/v1/webhooks": (MINE, {"url": "https://receiver.example/hook", "event_types": ["key.revoked"]}),
    "GET /api/v1/webhooks/{webhook_id}": (OWNED, None),
    "PATCH /api/v1/webhooks/{webhook_id}": (OWNED, {"enabled": False}),
    "DELETE /api/v1/webhooks/{webhook_id}": (OWNED, None),
    "POST /api/v1/webhooks/{webhook_id}/rotate": (OWNED, {"overlap_s": 0}),
    "POST /api/v1/webhooks/{webhook_id}/ping": (OWNED, None),
    "GET /api/v1/webhooks/{webhook_id}/deliveries": (OWNED, None),
    "GET /api/v1/webhooks/{webhook_id}/deliveries/{delivery_id}": (OWNED, None),
    "POST /api/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay": (OWNED, None),
    "GET /api/v1/secrets": (LISTING, None),
    "PUT /api/v1/secrets/{name}": (MINE, {"value": "mine"}),
    "DELETE /api/v1/secrets/{name}": (OWNED, None),
    "GET /api/v1/signing-keys": (LISTING, None),
    "POST /api/v1/signing-keys": (MINE, {"name": "mine", "public_key": "none"}),
    "DELETE /api/v1/signing-keys/{name}": (OWNED, None),
    "GET /api/v1/signing-policy": (LISTING, None),
    "PUT /api/v1/signing-policy": (MINE, {"policy": "off"}),
    "GET /api/v1/base-models": (LISTING, None),
    "POST /api/v1/base-models": (ADMIN, {"name": "other", "source": {"kind": "directory", "location": "/nowhere"}}),
    "GET /api/v1/base-models/{name}": (MINE, None),
    "DELETE /api/v1/base-models/{name}": (ADMIN, None),
    "PUT /api/v1/blobs/{sha256}": (MINE, None),
    "GET /api/v1/blobs/{sha256}": (OWNED, None),
    "HEAD /api/v1/blobs/{sha256}": (OWNED, None),
    "POST /api/v1/uploads": (MINE, None),
    "GET /api/v1/uploads": (LISTING, None),
    "GET /api/v1/uploads/{upload_id}": (OWNED, None),
    "DELETE /api/v1/uploads/{upload_id}": (OWNED, None),
    "POST /api/v1/uploads/{upload_id}/parts": (OWNED, {"numbers": [1]}),
    "PUT /api/v1/uploads/{upload_id}/parts/{number}": (OWNED, None),
    "POST /api/v1/uploads/{upload_id}/complete": (OWNED, None),
    "GET /api/v1/adapters": (LISTING, None),
    "GET /api/v1/adapters/{name}": (OWNED, None),
    "PATCH /api/v1/adapters/{name}": (OWNED, {"description": "mine now"}),
    "DELETE /api/v1/adapters/{name}": (OWNED, None),
    "POST /api/v1/adapters/{name}/restore": (OWNED, None),
    "POST /api/v1/adapters/{name}/purge": (OWNED, None),
    "GET /api/v1/adapters/{name}/versions": (OWNED, None),
    "POST /api/v1/adapters/{name}/versions": (MINE, None),
    "GET /api/v1/adapters/{name}/versions/{number}": (OWNED, None),
    "GET /api/v1/adapters/{name}/versions/{number}/lineage": (OWNED, None),
    "DELETE /api/v1/adapters/{name}/versions/{number}": (OWNED, None),
    "GET /api/v1/adapters/{name}/versions/{number}/card": (OWNED, None),
    "POST /api/v1/adapters/{name}/versions/{number}/restore": (OWNED, None),
    "POST /api/v1/adapters/{name}/versions/{number}/purge": (OWNED, None),
    "GET /api/v1/adapters/{name}/versions/{number}/files/{path}": (OWNED, None),
    "GET /api/v1/adapters/{name}/aliases": (OWNED, None),
    "GET /api/v1/adapters/{name}/aliases/{alias}": (OWNED, None),
    "PUT /api/v1/adapters/{name}/aliases/{alias}": (OWNED, {"version": 1}),
    "DELETE /api/v1/adapters/{name}/aliases/{alias}": (OWNED, None),
    "GET /api/v1/adapters/{name}/aliases/{alias}/history": (OWNED, None),
    "GET /api/v1/jobs": (LISTING, None),
    "GET /api/v1/jobs/{job_id}": (OWNED, None),
    "GET /api/v1/jobs/{job_id}/events": (OWNED, None),
    "POST /api/v1/jobs/{job_id}/cancel": (OWNED, None),
    "GET /api/v1/replicas": (ADMIN, None),
    "POST /api/v1/replicas": (REPLICA, None),
    "GET /api/v1/replicas/{replica_id}/state": (ADMIN, None),
    "POST /api/v1/replicas/{replica_id}/heartbeat": (REPLICA, None),
    "POST /api/v1/replicas/{replica_id}/usage": (REPLICA, None),
    "POST /api/v1/resolve": (REPLICA, None),
    "GET /api/v1/pull/{sha256}": (REPLICA, None),
    "POST /api/v1/imports": (MINE, None),
    "GET /api/whoami-v2": (LISTING, None),
    "GET /api/models/{tenant}/{adapter}": (OWNED, None),
    "GET /api/models/{tenant}/{adapter}/revision/{revision}": (OWNED, None),
    "GET /api/models/{tenant}/{adapter}/tree/{revision}": (OWNED, None),
    "GET /api/models/{tenant}/{adapter}/tree/{revision}/{path}": (OWNED, None),
    "GET /{tenant}/{adapter}/resolve/{revision}/{path}": (OWNED, None),
    "HEAD /{tenant}/{adapter}/resolve/{revision}/{path}": (OWNED, None),
    "GET /v1/models": (LISTING, None),
    "GET /v1/models/{model}": (OWNED, None),
    "POST /v1/completions": (OWNED, {"model": "{model}", "prompt": "hello", "max_tokens": 1}),
    "POST /v1/chat/completions": (OWNED, {"model": "{model}", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}),
}


@pytest.fixture(scope="module")
def stage(lorary: Lorary) -> tuple[str, World, World]:
    """A's key, B's identifiers, and identifiers that never were."""
    mine, theirs = lorary.make_tenant("isolated-a"), lorary.make_tenant("isolated-b")
    push(lorary, mine, "own", ADAPTERS / "json")
    push(lorary, theirs, "veiled", ADAPTERS / "pirate")
    with lorary.http(theirs) as client:
        version = client.get("/api/v1/adapters/veiled/versions/1").json()
        sha256 = next(file["sha256"] for file in version["files"] if file["path"] == "adapter_model.safetensors")
        key_id = client.get("/api/v1/keys").json()["items"][0]["id"]
        job_id = client.get("/api/v1/jobs").json()["items"][0]["id"]
        upload_id = client.post("/api/v1/uploads", json={"sha256": "cd" * 32, "size": 5}).json()["id"]
        hook = {"url": "https://receiver.example/hook", "event_types": ["key.revoked"]}
        webhook_id = client.post("/api/v1/webhooks", json=hook).json()["id"]
    with lorary.http() as client:
        replica_id = client.get("/api/v1/replicas").json()["items"][0]["id"]
    file = "adapter_config.json"
    b = World("isolated-b", "veiled", "default", "1", file, sha256, key_id, job_id, replica_id, "veiled", "veiled", upload_id=upload_id)
    nothing = World(
        "never-was", "ghost1", "default", "1", file, ABSENT_DIGEST, "0" * len(key_id), "0" * len(job_id), "0" * 32, "ghost1", "ghost1"
    )
    return mine, replace(b, webhook_id=webhook_id), nothing


def fill(template: str, world: World) -> str:
    for name, value in vars(world).items():
        template = template.replace("{" + name + "}", value)
    assert "{" not in template or template.startswith("{"), f"the table does not know how to fill {template}"
    return template


def call(client: httpx2.Client, operation: str, body: JSON | None, world: World) -> httpx2.Response:
    method, template = operation.split(" ", 1)
    path = template.replace("{path:path}", "{path}")
    if path.startswith("/api/v1/tenants/"):
        path = path.replace("{name}", world.tenant)
    if path.startswith("/api/v1/base-models/"):
        path = path.replace("{name}", "smollm2")
    content = json.loads(json.dumps(body).replace("{model}", world.model)) if body is not None else None
    headers = {"If-Match": '"1"'} if method == "PUT" else {}
    return client.request(method, fill(path, world), json=content, headers=headers)


def visible(response: httpx2.Response, world: World) -> tuple[int, str, list[str]]:
    """What a prober could compare: status, body and headers without the words it sent itself and per-request values."""
    text = response.text.replace(response.headers["x-request-id"], "*")
    for word in sorted(set(vars(world).values()), key=len, reverse=True):
        if len(word) > 1:
            text = text.replace(word, "*")
    headers = sorted(name for name in response.headers if name not in {"date", "x-request-id"})
    return response.status_code, text, headers


def test_the_table_names_every_operation(lorary: Lorary) -> None:
    with lorary.http() as client:
        paths = client.get("/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert operations - set(TABLE) == set(), "add a row for each new route"
    assert set(TABLE) - operations == set(), "routes that are gone"


@pytest.mark.parametrize("operation", [name for name, (kind, _) in TABLE.items() if kind == OWNED])
def test_what_is_theirs_looks_like_what_never_was(lorary: Lorary, stage: tuple[str, World, World], operation: str) -> None:
    mine, theirs, nothing = stage
    with lorary.http(mine) as client:
        got, ghost = (call(client, operation, TABLE[operation][1], world) for world in (theirs, nothing))
    assert got.status_code == httpx2.codes.NOT_FOUND, got.text
    assert visible(got, theirs) == visible(ghost, nothing)


@pytest.mark.parametrize("operation", [name for name, (kind, _) in TABLE.items() if kind == LISTING])
def test_listings_show_nothing_of_theirs(lorary: Lorary, stage: tuple[str, World, World], operation: str) -> None:
    mine, theirs, _ = stage
    with lorary.http(mine) as client:
        got = call(client, operation, None, theirs)
    if operation.startswith("GET /api/v1/audit") and got.status_code == httpx2.codes.FORBIDDEN:
        return
    assert got.status_code == httpx2.codes.OK, got.text
    for word in ("veiled", "isolated-b", theirs.sha256, theirs.key_id, theirs.job_id):
        assert word not in got.text


@pytest.mark.parametrize("operation", [name for name, (kind, _) in TABLE.items() if kind in (ADMIN, REPLICA)])
def test_a_tenants_key_is_no_admin_and_no_replica(lorary: Lorary, stage: tuple[str, World, World], operation: str) -> None:
    mine, theirs, nothing = stage
    with lorary.http(mine) as client:
        got, ghost = (call(client, operation, TABLE[operation][1] or {}, world) for world in (theirs, nothing))
    assert got.status_code == httpx2.codes.FORBIDDEN, got.text
    assert visible(got, theirs) == visible(ghost, nothing)


@pytest.mark.parametrize("operation", [name for name, (kind, _) in TABLE.items() if kind != PUBLIC])
@pytest.mark.parametrize("token", ["", "lry_nonsense", "sk-123"])
def test_no_key_no_answer(lorary: Lorary, stage: tuple[str, World, World], operation: str, token: str) -> None:
    _, theirs, _ = stage
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx2.Client(base_url=lorary.url, headers=headers, timeout=60) as client:
        got = call(client, operation, TABLE[operation][1] or {}, theirs)
    assert got.status_code == httpx2.codes.UNAUTHORIZED, f"{got.status_code} {got.text}"


def test_the_tenant_header_does_not_let_a_tenant_key_out(lorary: Lorary, stage: tuple[str, World, World]) -> None:
    mine, theirs, _ = stage
    with lorary.http(mine, tenant=theirs.tenant) as client:
        got = client.get("/api/v1/adapters")
    assert got.status_code in (httpx2.codes.FORBIDDEN, httpx2.codes.OK)
    assert "veiled" not in got.text


def test_the_same_bytes_in_two_tenants_stay_two(lorary: Lorary, tenant_name: Callable[[str], str]) -> None:
    """Pushing what another tenant already stores must cost an upload: "you need not send it" would be an oracle."""
    first, second = lorary.make_tenant(tenant_name("same")), lorary.make_tenant(tenant_name("same"))
    push(lorary, first, "pirate", ADAPTERS / "pirate")
    with lorary.http(first) as client:
        sha256 = client.get("/api/v1/adapters/pirate/versions/1").json()["files"][1]["sha256"]
    with lorary.http(second) as client:
        assert client.head(f"/api/v1/blobs/{sha256}").status_code == httpx2.codes.NOT_FOUND
