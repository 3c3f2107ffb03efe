"""One Lorary imports from another over loopback, and from hubs that lie, break off or have nothing for us."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from registry.app import create_app
from registry.bootstrap import init_database
from registry.config import Settings
from registry.db import Database
from tests.generate import BASE_NAME
from tests.registry.adapters.pushing import Pusher, adapter, nan_adapter, write_base_model
from tests.registry.conftest import bearer, serve
from tests.registry.hub.conftest import FILES, NEWER, token_of
from tests.registry.signing.conftest import make_pair
from workers.__main__ import build_worker
from workers.shell import Worker

WEIGHTS = "adapter_model.safetensors"
COMMIT = "c" * 40
SCOPES = ["adapters:read", "adapters:write", "jobs:read", "jobs:write", "secrets:write", "signing:write"]


class LyingHub:
    """Describes what it likes and serves what it likes."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.lfs: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.status, self.error = 200, ""
        self.before_each_byte: Callable[[], object] | None = None
        self.bytes_served = 0
        self.app = FastAPI()
        self.app.get("/api/models/{repo:path}")(self._describe)
        self.app.get("/{namespace}/{name}/resolve/{revision}/{path:path}")(self._serve)

    def _describe(self, repo: str) -> Response:
        if self.status != 200:
            return JSONResponse({}, status_code=self.status, headers={"X-Error-Code": self.error})
        siblings = [self._sibling(path, data) for path, data in self.files.items()]
        return JSONResponse({"id": repo, "sha": COMMIT, "siblings": siblings})

    def _sibling(self, path: str, data: bytes) -> dict[str, Any]:
        size = self.sizes.get(path, len(data))
        lfs = {"lfs": {"sha256": self.lfs[path], "size": size, "pointerSize": 130}} if path in self.lfs else {}
        return {"rfilename": path, "size": size} | lfs

    def _serve(self, path: str) -> Response:
        if path == WEIGHTS and self.before_each_byte is not None:
            return StreamingResponse(self._drip(self.files[path]), headers={"Content-Length": str(len(self.files[path]))})
        return Response(self.files[path], media_type="application/octet-stream")

    def _drip(self, data: bytes) -> Iterator[bytes]:
        assert self.before_each_byte is not None
        for index in range(len(data)):
            self.before_each_byte()
            yield data[index : index + 1]
            self.bytes_served = index + 1
            time.sleep(0.02)


@dataclass(frozen=True)
class Target:
    """The registry that imports: a tenant's client of it, and its worker."""

    mine: Pusher
    worker: Worker

    def start(self, **body: Any) -> Any:
        return self.mine.call("POST", "/imports", json=body)

    def run(self, **body: Any) -> dict[str, Any]:
        """The job of an import, once all that it set off has ended."""
        accepted = self.start(**body)
        assert accepted.status_code == 202, accepted.text
        while self.worker.run_one():
            pass
        job: dict[str, Any] = self.mine.get(f"/jobs/{accepted.json()['job_id']}")
        return job

    def refused(self, **body: Any) -> str:
        """The code of an import that is refused for good, at once."""
        job = self.run(**body)
        assert (job["state"], job["attempt"], job["result"]["outcome"]) == ("succeeded", 1, "refused"), job
        assert self.mine.get("/adapters")["items"] == []
        return str(job["result"]["code"])


@pytest.fixture
def hub() -> LyingHub:
    return LyingHub()


@pytest.fixture
def hub_url(hub: LyingHub) -> Iterator[str]:
    with serve(hub.app) as url:
        yield url


@contextmanager
def making_target(folder: Path, *endpoints: str, **options: Any) -> Iterator[Target]:
    guard = {"outbound_allow_hosts": ("127.0.0.1",), "outbound_allow_http": True}
    made = init_database(Settings(state_dir=folder / "target", hub_endpoints=endpoints, **(guard | options)))
    assert made.admin_token is not None
    database = Database(made.settings.resolved_database_url)
    worker = build_worker(made.settings, database)
    with TestClient(create_app(made.settings), raise_server_exceptions=False) as client:
        admin = Pusher(client, bearer(made.admin_token))
        source = {"kind": "directory", "location": str(write_base_model(folder / "base"))}
        admin.call("POST", "/base-models", json={"name": "tiny", "source": source, "upstream_names": [BASE_NAME]})
        admin.call("POST", "/tenants", json={"name": "umbrella"})
        key = admin.call("POST", "/keys", json={"name": "test", "scopes": SCOPES}, headers={"X-Lorary-Tenant": "umbrella"})
        assert worker.run_one()
        yield Target(Pusher(client, bearer(key.json()["token"])), worker)
    database.close()


@pytest.fixture
def target(hub_url: str, tmp_path: Path) -> Iterator[Target]:
    with making_target(tmp_path, hub_url) as made:
        yield made


class TestFromAnotherLorary:
    @pytest.fixture
    def target(self, server_url: str, tmp_path: Path) -> Iterator[Target]:
        with making_target(tmp_path, server_url) as made:
            yield made

    def test_an_adapter_arrives_byte_for_byte(
        self, target: Target, server_url: str, acme: Pusher, pirate: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
    ) -> None:
        target.mine.call("PUT", "/secrets/acme-token", json={"value": token_of(acme)})
        body = {"repo": "acme/pirate", "endpoint": server_url, "token_secret": "acme-token"}
        job = target.run(**body, revision="prod")
        assert job["result"]["outcome"] == "imported", job
        assert (job["result"]["adapter"], job["result"]["number"]) == ("pirate", 1)
        assert job["progress"]["done_bytes"] <= job["progress"]["total_bytes"] == sum(map(len, FILES.values()))
        version = target.mine.get("/adapters/pirate/versions/1")
        assert (version["status"], version["version_digest"]) == ("ready", pirate[0]["version_digest"])
        assert target.run(**body)["result"]["number"] == 2
        assert target.run(**body, revision="1")["result"]["number"] == 1, "the same bytes are the same version"
        source = target.mine.get("/adapters/pirate/versions/2/card")["imported_from"]
        assert (source["repo"], source["endpoint"], source["commit"]) == ("acme/pirate", server_url, pirate[1]["version_digest"][:40])
        (link,) = [
            link for link in target.mine.get("/adapters/pirate/versions/2/lineage")["came_from"] if link["relation"] == "imported_from"
        ]
        assert link["id"] == f"{server_url}/acme/pirate@{source['commit']}"
        assert link["details"]["job_id"] is not None, "the worker that made the change is named"
        for path, data in NEWER.items():
            assert target.mine.call("GET", f"/adapters/pirate/versions/2/files/{path}").content == data
        assert token_of(acme) not in caplog.text + str(job)

    def test_what_the_token_may_not_read_is_not_there(self, target: Target, server_url: str, acme: Pusher, globex: Pusher) -> None:
        target.mine.call("PUT", "/secrets/acme-token", json={"value": token_of(acme)})
        known = {"endpoint": server_url, "token_secret": "acme-token"}
        assert target.refused(repo="globex/pirate", **known) == "hub_repo_not_found"
        assert acme.push("pirate", adapter()).status_code == 201
        assert target.refused(repo="acme/pirate", revision="staging", **known) == "hub_revision_not_found"
        assert target.refused(repo="acme/pirate", endpoint=server_url) == "hub_refused", "no token was sent"


class TestWhatIsRefused:
    def test_an_endpoint_that_the_operator_does_not_list(self, target: Target) -> None:
        for endpoint in ("http://169.254.169.254", "https://elsewhere.example", "file:///etc/passwd", ""):
            answer = target.start(repo="org/name", endpoint=endpoint)
            assert (answer.status_code, answer.json()["code"]) == (422, "endpoint_not_allowed")

    def test_an_address_inside_unless_the_operator_allows_it(self, hub_url: str, tmp_path: Path) -> None:
        """The list of hubs says to whom, the list of hosts says where to: a hub's name may come to lead inside."""
        with making_target(tmp_path, hub_url, outbound_allow_hosts=()) as target:
            assert target.refused(repo="org/name", endpoint=hub_url) == "outbound_refused"

    def test_requests_that_make_no_sense(self, target: Target) -> None:
        bodies: list[tuple[dict[str, Any], str]] = [
            ({"repo": "no-namespace"}, "body.repo"),
            ({"repo": "org/../x"}, "body.repo"),
            ({"repo": "org/name", "revision": "a b"}, "body.revision"),
            ({"repo": "org/name", "name": "UPPER"}, "body.name"),
            ({"repo": "org/Name.With_All-" + "x" * 60}, "name"),
            ({"repo": "org/name", "token_secret": "absent"}, "token_secret"),
            ({"repo": "org/name", "token": "hf_x"}, "body.token"),
        ]
        for body, field in bodies:
            answer = target.start(**body)
            assert (answer.status_code, answer.json()["field"]) == (422, field), body

    def test_repositories_without_an_adapter_for_us(self, target: Target, hub: LyingHub, hub_url: str) -> None:
        body = {"repo": "org/name", "endpoint": hub_url}
        hub.files = {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04pickle"}
        assert target.refused(**body) == "hub_no_adapter"
        hub.files, hub.sizes = dict(FILES), {WEIGHTS: 3 * 2**30}
        assert target.refused(**body) == "file_too_large"
        hub.files, hub.sizes = adapter(3, base_name="org/unknown-base").files, {}
        assert target.refused(**body) == "base_model_unknown"
        hub.files = adapter(3).with_config(use_dora=True).files
        assert target.refused(**body) not in {"", "internal"}
        hub.files, hub.status, hub.error = dict(FILES), 403, "GatedRepo"
        assert target.refused(**body) == "hub_repo_not_found"
        assert target.refused(repo="org/double--dash", endpoint=hub_url) == "hub_repo_invalid"

    def test_the_gate_looks_at_the_weights(self, target: Target, hub: LyingHub, hub_url: str) -> None:
        hub.files = nan_adapter().files
        assert target.run(repo="org/name", endpoint=hub_url)["result"]["outcome"] == "imported"
        assert target.mine.get("/adapters/name/versions/1")["status"] == "rejected"

    def test_only_an_adapters_files_are_taken(self, target: Target, hub: LyingHub, hub_url: str) -> None:
        hub.files = FILES | {"optimizer.pt": b"x" * 100, "../../evil": b"y", "README.md": b"z" * (2**20 + 1)}
        assert target.run(repo="org/Name", endpoint=hub_url)["result"]["adapter"] == "name"
        version = target.mine.get("/adapters/name/versions/1")
        assert [file["path"] for file in version["files"]] == ["adapter_config.json", WEIGHTS]


class TestSignatures:
    def test_imports_are_judged_like_pushes(self, target: Target, hub: LyingHub, hub_url: str, tmp_path: Path) -> None:
        pair = make_pair(tmp_path / "pair")
        target.mine.call("POST", "/signing-keys", json={"name": "publisher", "public_key": pair.public})
        assert target.mine.call("PUT", "/signing-policy", json={"policy": "require"}).status_code == 200
        body = {"repo": "org/name", "endpoint": hub_url}
        assert target.refused(**body) == "signature_required"
        hub.files = pair.signed(FILES) | {"model.sig": b" " * (64 * 2**10 + 1)}
        assert target.refused(**body) == "file_too_large", "a signature that is left out would look like none"
        hub.files = pair.signed(FILES) | {"README.md": b"another"}
        assert target.refused(**body) == "signature_mismatch"
        hub.files = pair.signed(FILES)
        assert target.run(**body)["result"]["outcome"] == "imported"
        version = target.mine.get("/adapters/name/versions/1")
        assert (version["status"], version["signature"]["key"]) == ("ready", "publisher")


class TestHubsThatFail:
    def test_bytes_that_are_not_the_announced_ones_are_never_kept(
        self, target: Target, hub: LyingHub, hub_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("workers.shell.backoff_s", lambda _attempt: 3600.0)
        for change in ({"lfs": {WEIGHTS: hashlib.sha256(b"other").hexdigest()}}, {"sizes": {WEIGHTS: 100}}, {"sizes": {WEIGHTS: 10**6}}):
            hub.lfs, hub.sizes = change.get("lfs", {}), change.get("sizes", {})
            job = target.run(repo="org/name", endpoint=hub_url)
            assert (job["state"], job["attempt"]) == ("queued", 1), "a hub may heal"
            assert job["error"]["code"] == "internal"
            digest = hashlib.sha256(FILES[WEIGHTS]).hexdigest()
            assert target.mine.call("HEAD", f"/blobs/{digest}").status_code == 404

    def test_an_outage_is_waited_for(self, target: Target, hub: LyingHub, hub_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("workers.shell.backoff_s", lambda _attempt: 0.0)
        hub.status = 503
        accepted = target.start(repo="org/name", endpoint=hub_url).json()
        assert target.worker.run_one()
        assert target.mine.get(f"/jobs/{accepted['job_id']}")["state"] == "queued"
        hub.status = 200
        while target.worker.run_one():
            pass
        assert target.mine.get("/adapters/name/versions/1")["status"] == "ready"

    def test_a_cancelled_import_stops_in_the_middle_of_a_file(self, hub: LyingHub, hub_url: str, tmp_path: Path) -> None:
        with making_target(tmp_path, hub_url, job_lease_s=1.0) as target:
            accepted = target.start(repo="org/name", endpoint=hub_url).json()
            cancels = iter([f"/jobs/{accepted['job_id']}/cancel"])
            # Once: the hub goes on dripping for a while after the import has hung up, and the client is closed by then.
            hub.before_each_byte = lambda: [target.mine.call("POST", path) for path in cancels]
            assert target.worker.run_one()
            assert target.mine.get(f"/jobs/{accepted['job_id']}")["state"] == "cancelled"
            assert 0 < hub.bytes_served < len(FILES[WEIGHTS])
            assert target.mine.get("/adapters")["items"] == []
