"""The application around the endpoints: error shapes, request ids, limits, outages, probes, the OpenAPI document."""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr

import migrations
from registry.app import create_app
from registry.config import Settings
from registry.db import Database
from tests.registry.conftest import SECRET_KEY, MakeTenant, bearer, serve

PROBLEM = "application/problem+json"


def test_unknown_path_and_method_are_problems(client: TestClient) -> None:
    absent = client.get("/api/v1/nothing/here")
    assert (absent.status_code, absent.headers["content-type"]) == (404, PROBLEM)
    assert absent.json()["instance"] == "/api/v1/nothing/here"
    wrong = client.put("/api/v1/whoami")
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "GET")


def test_problem_names_field_value_and_remedy(client: TestClient, admin_token: str) -> None:
    body = client.get("/api/v1/tenants/nobody", headers=bearer(admin_token)).json()
    assert body["type"] == "/problems/not_found"
    assert (body["status"], body["field"], body["value"]) == (404, "name", "nobody")
    assert body["remedy"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"name": 1}', b"\xff\xfe", b'{"name": "' + b"[" * 5000])
def test_unreadable_bodies_are_problems(client: TestClient, admin_token: str, content: bytes) -> None:
    reply = client.post("/api/v1/tenants", content=content, headers=bearer(admin_token) | {"Content-Type": "application/json"})
    assert reply.status_code in {400, 422}, reply.text
    assert reply.headers["content-type"] == PROBLEM


def test_every_wrong_field_is_told(client: TestClient, admin_token: str) -> None:
    reply = client.get("/api/v1/tenants", params={"limit": 0, "cursor": "x" * 600}, headers=bearer(admin_token))
    assert reply.status_code == 422
    assert {item["field"] for item in reply.json()["errors"]} == {"query.limit", "query.cursor"}


@pytest.mark.parametrize(
    "key", [["0001-01-01T00:00:00+23:59", "x"], ["9999-12-31T23:59:59-23:59", "x"], ["2026-01-01T00:00:00+00:00", "\ud800"], []]
)
def test_a_forged_cursor_is_a_bad_request(client: TestClient, admin_token: str, key: list[str]) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")
    reply = client.get("/api/v1/tenants", params={"cursor": cursor}, headers=bearer(admin_token))
    assert (reply.status_code, reply.json()["field"]) == (400, "cursor")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("tenants", rb'{"name": "\ud800"}'),
        ("tenants", rb'{"name": "a", "\ud800": 1}'),
        ("keys", rb'{"name": "a\ud800", "scopes": ["admin"]}'),
    ],
)
def test_text_that_no_reply_can_hold_is_refused(client: TestClient, admin_token: str, path: str, content: bytes) -> None:
    reply = client.post(f"/api/v1/{path}", content=content, headers=bearer(admin_token) | {"Content-Type": "application/json"})
    assert reply.status_code in {400, 422}, reply.text
    assert reply.headers["content-type"] == PROBLEM


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("keys", rb'{"name": "a\u0000b", "scopes": ["admin"]}'),
        ("base-models", rb'{"name": "a", "source": {"kind": "directory", "location": "/a\u0000"}}'),
    ],
)
def test_text_holds_no_nul(client: TestClient, admin_token: str, path: str, body: bytes) -> None:
    reply = client.post(f"/api/v1/{path}", content=body, headers=bearer(admin_token) | {"Content-Type": "application/json"})
    assert reply.status_code == 422, reply.text
    assert "\\x00" in reply.json()["detail"]


def test_a_key_that_stands_twice_is_named(client: TestClient, admin_token: str) -> None:
    headers = bearer(admin_token) | {"Content-Type": "application/json; charset=utf-8"}
    reply = client.post("/api/v1/tenants", content=b'{"name": "one", "name": "two"}', headers=headers)
    assert (reply.status_code, reply.json()["code"], reply.json()["field"], reply.json()["value"]) == (400, "duplicate_key", "body", "name")
    assert client.get("/api/v1/tenants", headers=bearer(admin_token)).json()["items"] == []


def test_what_is_not_json_says_where(client: TestClient, admin_token: str) -> None:
    headers = bearer(admin_token) | {"Content-Type": "application/json"}
    reply = client.post("/api/v1/tenants", content=b'{"name": \n one}', headers=headers)
    assert (reply.status_code, reply.json()["code"], reply.json()["field"]) == (400, "invalid_json", "body")
    assert "line 2, column 2" in reply.json()["detail"]
    assert reply.json()["remedy"]


def test_a_bad_cursor_is_a_bad_request(client: TestClient, admin_token: str) -> None:
    reply = client.get("/api/v1/tenants", params={"cursor": "zzz"}, headers=bearer(admin_token))
    assert (reply.status_code, reply.json()["field"]) == (400, "cursor")


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/nothing")])
def test_openai_paths_answer_in_openai_shape(client: TestClient, method: str, path: str) -> None:
    reply = client.request(method, path)
    assert reply.status_code == (404 if "nothing" in path else 401)
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_request_id_is_ours_in_header_and_body(client: TestClient) -> None:
    first, second = (client.get("/api/v1/whoami", headers={"X-Request-Id": "chosen"}) for _ in range(2))
    assert first.headers["x-request-id"] != second.headers["x-request-id"] != "chosen"
    assert first.json()["request_id"] == first.headers["x-request-id"]


@pytest.mark.parametrize("given", ["", "x" * 129, "umläut".encode()])
def test_what_is_no_request_id_does_not_come_back(client: TestClient, given: str | bytes) -> None:
    assert "x-client-request-id" not in client.get("/api/v1/whoami", headers={"X-Request-Id": given}).headers  # type: ignore[dict-item]


@pytest.mark.parametrize("path", ["/%5C%01", "/%00%0d%0aX-Injected:%20x", "/%7f%c3%a9"])
def test_a_path_of_control_characters_is_a_404_whose_headers_can_be_sent(server_url: str, path: str) -> None:
    reply = httpx2.get(server_url + path)
    assert reply.status_code == 404
    assert "x-injected" not in reply.headers
    assert reply.headers["x-error-message"].startswith("nothing answers at /")


def test_unknown_errors_are_problems_without_details(settings: Settings, database: Database) -> None:
    app = create_app(settings)

    @app.get("/api/v1/broken")
    def broken() -> None:
        raise RuntimeError("the secret inside")

    with TestClient(app, raise_server_exceptions=False) as client:
        reply = client.get("/api/v1/broken")
    assert (reply.status_code, reply.json()["code"]) == (500, "internal")
    assert "secret" not in reply.text
    assert reply.json()["request_id"] == reply.headers["x-request-id"]


@pytest.fixture
def small_client(settings: Settings, database: Database) -> Iterator[TestClient]:
    with TestClient(create_app(settings.model_copy(update={"max_body_bytes": 1000})), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(900, 422), (1200, 413)])
def test_json_bodies_are_limited(small_client: TestClient, admin_token: str, chunked: bool, size: int, status: int) -> None:
    content = b'{"name": "' + b"A" * (size - 12) + b'"}'
    sent = iter([content[:500], content[500:]]) if chunked else content
    reply = small_client.post("/api/v1/tenants", content=sent, headers=bearer(admin_token) | {"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == PROBLEM
    if status == 413:
        assert (reply.json()["code"], "1000" in reply.json()["detail"]) == ("too_large", True)


def test_openai_bodies_are_limited_in_openai_shape(small_client: TestClient, make_tenant: MakeTenant) -> None:
    reply = small_client.post("/v1/completions", content=b"x" * 2000, headers=bearer(make_tenant("acme")))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


def test_blobs_have_their_own_limit(small_client: TestClient, make_tenant: MakeTenant) -> None:
    import hashlib

    content = b"x" * 5000
    path = f"/api/v1/blobs/{hashlib.sha256(content).hexdigest()}"
    assert small_client.put(path, content=content, headers=bearer(make_tenant("acme"))).status_code == 201


def _outage(reply) -> None:
    assert reply.status_code == 503, reply.text
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.sqlite
def test_locked_database_is_503_with_retry_after(settings: Settings, database: Database, admin_token: str) -> None:
    impatient = settings.model_copy(update={"database_busy_timeout_s": 0.1})
    holder = sqlite3.connect(settings.state_dir / "lorary.sqlite3", isolation_level=None)
    with TestClient(create_app(impatient), raise_server_exceptions=False) as client:
        holder.execute("BEGIN IMMEDIATE")
        reply = client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token))
        _outage(reply)
        assert reply.json()["code"] == "unavailable"
        assert client.get("/api/v1/whoami", headers=bearer(admin_token)).status_code == 200, "readers go on"
        holder.execute("ROLLBACK")
        assert client.post("/api/v1/tenants", json={"name": "acme"}, headers=bearer(admin_token)).status_code == 201
    holder.close()


@pytest.mark.sqlite
@pytest.mark.parametrize("kind", ["garbage", "directory", "missing_folder", "no_tables"])
def test_broken_database_is_503_everywhere_and_livez_stays(settings: Settings, tmp_path, kind: str, make_key_offline: str) -> None:
    path = tmp_path / "broken.sqlite3"
    if kind == "garbage":
        path.write_bytes(b"this is not a database" * 500)
    elif kind == "directory":
        path.mkdir()
    elif kind == "missing_folder":
        path = tmp_path / "absent" / "db.sqlite3"
    broken = settings.model_copy(update={"database_url": f"sqlite:///{path}"})
    with TestClient(create_app(broken), raise_server_exceptions=False) as client:
        for method, url in (("GET", "/api/v1/whoami"), ("GET", "/v1/models"), ("POST", "/v1/completions")):
            reply = client.request(method, url, headers=bearer(make_key_offline))
            _outage(reply)
            assert ("error" in reply.json()) == url.startswith("/v1")
        assert client.get("/livez").json() == {"status": "ok"}
        ready = client.get("/readyz")
        _outage(ready)
        assert ready.json()["status"] == "unavailable"


@pytest.fixture
def make_key_offline() -> str:
    from registry.tenants.keys import new_key

    return new_key().token


@pytest.fixture
def migrated(settings: Settings) -> Settings:
    settings.state_dir.mkdir(parents=True)
    migrations.upgrade(settings.resolved_database_url)
    return settings


@pytest.mark.sqlite
def test_readyz_tells_the_truth(migrated: Settings) -> None:
    with TestClient(create_app(migrated)) as client:
        assert client.get("/readyz").json() == {"status": "ok", "checks": {"database": "ok", "schema": "ok", "blob_store": "ok"}}
        migrations.downgrade(migrated.resolved_database_url, "base")
        old = client.get("/readyz")
        assert old.status_code == 503
        assert "lorary db upgrade" in old.json()["checks"]["schema"]
        migrations.upgrade(migrated.resolved_database_url)
        assert client.get("/readyz").status_code == 200


def test_readyz_notices_a_lost_blob_store(migrated: Settings) -> None:
    with TestClient(create_app(migrated)) as client:
        uploads = [path for path in migrated.blob_dir.rglob("*") if path.is_dir()]
        for path in [*sorted(uploads, reverse=True), migrated.blob_dir]:
            path.rmdir()
        migrated.blob_dir.write_text("a file where the folder was")
        reply = client.get("/readyz")
    assert reply.status_code == 503
    assert reply.json()["checks"]["blob_store"] != "ok"


def test_no_secret_key_no_application(tmp_path) -> None:
    with pytest.raises(ValueError, match="lorary db init"):
        create_app(Settings(state_dir=tmp_path, secret_key=SecretStr("")))


def test_the_secret_key_is_not_in_the_settings_repr(settings: Settings) -> None:
    assert SECRET_KEY not in repr(settings)


def test_openapi_says_every_error(app: FastAPI) -> None:
    document = app.openapi()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            responses = operation["responses"]
            assert "503" in responses or path == "/livez", where
            if path.startswith(("/api/", "/v1/")):
                assert {"401", "403"} <= set(responses), where
                assert operation["security"] == [{"ApiKey": []}], where
                schema = "OpenAIError" if path.startswith("/v1/") else "Problem"
                for status in (name for name in responses if int(name) >= 400):
                    (media,) = responses[status]["content"].values()
                    assert media["schema"] == {"$ref": f"#/components/schemas/{schema}"}, f"{where} {status}"
                if "{" in path:
                    assert "404" in responses or "/blobs/" in path or method in {"put", "post"}, where
            if "requestBody" in operation:
                assert "413" in responses, where


def test_every_endpoint_refuses_strangers(client: TestClient, app: FastAPI) -> None:
    """Table-driven over the document itself, so that a new endpoint cannot be forgotten."""
    checked = 0
    for path, operations in app.openapi()["paths"].items():
        if not path.startswith(("/api/", "/v1/")):
            continue
        for method in operations:
            url = path.replace("{sha256}", "0" * 64).replace("{number}", "1")
            url = re.sub(r"\{\w+\}", "x", url)
            reply = client.request(method, url, json={} if method in {"post", "put", "patch"} else None)
            assert reply.status_code == 401, f"{method} {url}: {reply.status_code} {reply.text}"
            checked += 1
    assert checked > 25


def test_replies_stream_through_the_middleware(app: FastAPI) -> None:
    """The first chunk arrives while the second is not made yet."""
    import threading

    import httpx2
    from fastapi.responses import StreamingResponse

    go_on = threading.Event()

    @app.get("/api/v1/slow")
    def slow() -> StreamingResponse:
        def chunks() -> Iterator[bytes]:
            yield b"first"
            assert go_on.wait(20)
            yield b"second"

        return StreamingResponse(chunks())

    with serve(app) as url, httpx2.Client(trust_env=False) as http, http.stream("GET", f"{url}/api/v1/slow") as reply:
        arriving = reply.iter_bytes()
        assert next(arriving) == b"first"
        assert "x-request-id" in reply.headers
        go_on.set()
        assert b"".join(arriving) == b"second"


def test_the_registry_needs_no_torch() -> None:
    """Importing and building the whole application with torch and its kin made unimportable."""
    program = """
import sys
for name in ("torch", "transformers", "numba", "safetensors", "triton"):
    sys.modules[name] = None
from registry.app import create_app
from registry.config import Settings
import registry.cli.main, registry.__main__, tempfile
with tempfile.TemporaryDirectory() as folder:
    assert create_app(Settings(state_dir=folder, secret_key="k" * 40)).openapi()["paths"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
