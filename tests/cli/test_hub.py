"""`lorary hub import`: one registry takes an adapter from the other."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from registry.app import create_app
from registry.artifact.base import BaseSpec
from registry.bootstrap import init_database
from registry.config import Settings
from registry.db import open_database
from tests.cli.conftest import Lorary, Registry
from tests.generate import BASE_NAME, generate_adapter
from tests.registry.conftest import serve
from workers.__main__ import build_worker


@pytest.fixture
def importer(registry: Registry, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lorary]:
    """The command of an operator of a second registry, whose tenant is `mirror`; it may import from the first."""
    guard = {"outbound_allow_hosts": ("127.0.0.1",), "outbound_allow_http": True, "hub_endpoints": (registry.url,)}
    made = init_database(Settings(state_dir=tmp_path / "second", job_poll_s=0.05, **guard))
    stop, database = threading.Event(), open_database(made.settings)
    worker = threading.Thread(target=build_worker(made.settings, database).run, args=(stop,), daemon=True)
    worker.start()
    with serve(create_app(made.settings)) as url:
        admin = Lorary(monkeypatch, tmp_path / "importer", url=url, key=made.admin_token)
        admin.ok("base-models", "add", "tiny", str(tiny_model_dir), "--upstream-name", BASE_NAME)
        admin.ok("tenants", "create", "mirror")
        admin.environment["LORARY_TENANT"] = "mirror"
        yield admin
    stop.set()
    worker.join(timeout=20)
    database.close()


@pytest.mark.usefixtures("base_model")
def test_import_waits_until_the_version_is_ready(
    registry: Registry, tenant: Lorary, importer: Lorary, tiny_model_dir: Path, tmp_path: Path
) -> None:
    spec = BaseSpec.from_config(json.loads((tiny_model_dir / "config.json").read_text()))
    pushed = tenant.ok("adapters", "push", "style", str(generate_adapter(spec, seed=1).write(tmp_path / "adapter")))
    repo = f"{_tenant_name(tenant)}/style"
    assert importer("secrets", "set", "token", stdin=tenant.environment["LORARY_API_KEY"]).code == 0
    options = ("--endpoint", registry.url, "--token-secret", "token", "--name", "copied")
    version = importer.ok("hub", "import", repo, *options)
    assert (version["adapter"], version["status"], version["version_digest"]) == ("copied", "ready", pushed["version_digest"])
    refused = importer("hub", "import", repo, "--revision", "staging", *options)
    assert refused.code == 1
    assert "has no such revision" in refused.stderr
    unlisted = importer("hub", "import", repo, "--endpoint", "http://10.0.0.1")
    assert unlisted.code == 1
    assert "LORARY_HUB_ENDPOINTS" in unlisted.stderr
    accepted = importer.ok("hub", "import", repo, *options, "--no-wait")
    assert (accepted["adapter"], accepted["repo"]) == ("copied", repo)


def test_base_models_by_hub_id(admin: Lorary, importer: Lorary, registry: Registry) -> None:
    unlisted = admin("base-models", "add", "other", "hub:org/base@v1.0", "--endpoint", "http://10.0.0.1")
    assert (unlisted.code, "LORARY_HUB_ENDPOINTS" in unlisted.stderr) == (1, True)
    assert "org/name@revision" in admin("base-models", "add", "other", "hub:base").stderr
    asked = importer("base-models", "add", "other", "hub:org/base@v1.0", "--endpoint", registry.url)
    assert (asked.code, "the hub" in asked.stderr) == (1, True), "a worker asked it, and it has no such repository"
    assert importer.ok("base-models", "show", "other")["source"] == {
        "kind": "hub", "location": "org/base@v1.0", "endpoint": registry.url, "token_secret": None,
    }  # fmt: skip


def _tenant_name(command: Lorary) -> str:
    """The name of a key's tenant, as the Hub's clients ask for it."""
    headers = {"Authorization": f"Bearer {command.environment['LORARY_API_KEY']}"}
    return str(httpx2.get(f"{command.url}/api/whoami-v2", headers=headers, trust_env=False).json()["name"])
