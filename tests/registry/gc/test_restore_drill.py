"""The drill: back up, destroy, restore, by the very commands of registry/OPERATIONS.md; then every blob is found by its digest."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

import migrations
from registry.app import create_app
from registry.blobs.service import open_blob_store
from registry.config import Settings
from registry.db import Database
from tests.postgresql import PostgreSQL
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import SECRET_KEY
from tests.registry.gc.conftest import stored
from tests.registry.places import Place, make_place
from tests.servers import S3_ADMIN, S3Server

ROOT = Path(__file__).resolve().parents[3]
Work = Callable[[], int]
Shell = Callable[[str], "subprocess.CompletedProcess[str]"]

# `aws s3 sync` as the commands use it: a real copy in the real store, by its API
AWS = """
import os, sys, boto3
from urllib.parse import urlsplit
source, target = (urlsplit(url) for url in sys.argv[4:6])
client = boto3.client("s3", endpoint_url=os.environ["LORARY_S3_ENDPOINT_URL"], region_name="us-east-1",
    aws_access_key_id=os.environ["LORARY_S3_ACCESS_KEY_ID"], aws_secret_access_key=os.environ["LORARY_S3_SECRET_ACCESS_KEY"])
assert sys.argv[1:4] == ["s3", "sync", "--only-show-errors"], sys.argv
start = source.path.strip("/") + "/"
for page in client.get_paginator("list_objects_v2").paginate(Bucket=source.netloc, Prefix=start):
    for item in page.get("Contents", ()):
        key = target.path.strip("/") + "/" + item["Key"].removeprefix(start)
        client.copy_object(Bucket=target.netloc, Key=key, CopySource={"Bucket": source.netloc, "Key": item["Key"]})
"""


def commands(name: str) -> str:
    """The block of the document that begins with `# drill: name`."""
    document = (ROOT / "registry" / "OPERATIONS.md").read_text()
    [block] = re.findall(rf"```bash\n# drill: {re.escape(name)}\n(.*?)```", document, re.DOTALL)
    return str(block)


def program(folder: Path, name: str, source: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(source)
    (folder / name).chmod(stat.S_IRWXU)


def make_shell(tmp_path: Path, environment: dict[str, str]) -> Shell:
    """Runs a block of commands as an operator would, with `lorary` in the path."""
    bin_dir = tmp_path / "bin"
    program(bin_dir, "lorary", f'#!/bin/sh\nexec {sys.executable} -m registry.cli "$@"\n')
    (tmp_path / "backup").mkdir(exist_ok=True)
    given = {name: value for name, value in os.environ.items() if not name.startswith(("LORARY_", "PG"))}
    given |= {"PATH": f"{bin_dir}:{given['PATH']}", "PYTHONPATH": str(ROOT), "BACKUP": str(tmp_path / "backup"), **environment}

    def run(block: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-euc", block], env=given, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)

    return run


def must(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def findings(shell: Shell) -> dict[str, dict[str, Any]]:
    """What the command of the document says, as JSON. (No registry runs here: the check `api` fails.)"""
    done = shell(commands("verify").rstrip() + " -o json")
    return {finding["check"]: finding for finding in json.loads(done.stdout)}


def fill(acme: Pusher, work: Work) -> str:
    """Versions, a deleted one, a blob that nobody named, a secret. Returns the digest of a file of version 1."""
    for seed in (1, 2):
        acme.push("pirate", adapter(seed))
    work()
    acme.call("DELETE", "/adapters/pirate/versions/2")
    acme.upload({"stray": b"not named yet"})
    assert acme.call("PUT", "/secrets/hub", json={"value": "hf_token"}).status_code in {200, 201, 204}
    files = acme.get("/adapters/pirate/versions/1")["files"]
    return str(next(file["sha256"] for file in files if file["path"].endswith(".safetensors")))


def check_restored(settings: Settings, acme: Pusher) -> None:
    """A registry over what was restored: old keys work, versions are there, the deleted one can come back."""
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        again = Pusher(client, acme.headers)
        for path, data in adapter(1).files.items():
            assert again.call("GET", f"/adapters/pirate/versions/1/files/{path}").content == data
        assert again.get("/adapters/pirate")["aliases"] == {"default": 1}
        assert again.call("POST", "/adapters/pirate/versions/2/restore").json()["status"] == "ready"
        assert again.get("/jobs")["items"], "history is there too"


@pytest.mark.sqlite
def test_sqlite_and_local_blobs(acme: Pusher, work: Work, settings: Settings, database: Database, *, tmp_path: Path) -> None:
    digest = fill(acme, work)
    settings.secret_key_file.write_text(SECRET_KEY)
    settings.secret_key_file.chmod(0o600)
    settings.state_dir.chmod(0o700)
    shell = make_shell(tmp_path, {"LORARY_STATE_DIR": str(settings.state_dir)})
    with database.write() as session:  # the fixture's tables come from the models, without migrations' mark
        session.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)"))
        session.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": migrations.head_revision()})
    before = stored(open_blob_store(settings))
    must(shell(commands("sqlite backup")))
    assert (tmp_path / "backup" / "lorary.sqlite3").stat().st_mode & 0o777 == 0o600
    acme.client.app.state.database.close()  # type: ignore[attr-defined]
    shutil.rmtree(settings.state_dir)
    must(shell(commands("sqlite restore")))
    found = findings(shell)
    assert (found["blobs"]["status"], found["blobs"]["detail"]) == ("ok", "4 of 4 hashed and equal")
    assert found["garbage"]["detail"].startswith("1 blobs (13 bytes) are not referenced; 0 objects")
    assert found["secrets"]["status"] == found["database schema"]["status"] == "ok"
    assert stored(open_blob_store(settings)) == before
    check_restored(settings, acme)
    _find_every_damage(settings, shell, tmp_path, digest=digest)


def _find_every_damage(settings: Settings, shell: Shell, tmp_path: Path, *, digest: str) -> None:
    store = open_blob_store(settings)
    [(tenant_id, _)] = [key for key in stored(store) if key[1] == digest]
    store.delete(tenant_id, digest)
    found = findings(shell)
    assert found["blobs"]["status"] == "failed"
    assert found["blobs"]["items"] == [f"missing {tenant_id}/{digest}"]
    other = make_shell(tmp_path, {"LORARY_STATE_DIR": str(settings.state_dir), "LORARY_SECRET_KEY": "another-key-" + uuid4().hex * 2})
    if not settings.database_url:
        found = findings(other)
        assert found["secrets"]["status"] == "failed"
        assert found["secrets"]["detail"].startswith("1 of 1 cannot be decrypted")


@pytest.fixture
def place(s3_server: S3Server) -> Place:
    return make_place(s3_server)


@pytest.mark.full
@pytest.mark.parametrize("store_kind", ["s3"], indirect=True)
def test_postgresql_and_s3(acme: Pusher, work: Work, settings: Settings, tmp_path: Path, *, place: Place, database_kind: str) -> None:
    """Onto a new server: what was destroyed is the server with its roles, and every object."""
    if database_kind != "postgresql":
        pytest.skip("the other half of the drill is the test above")
    import pgserver

    digest = fill(acme, work)
    before = stored(open_blob_store(settings))
    program(tmp_path / "bin", "aws", f"#!{sys.executable}\n{AWS}")
    environment = {
        "LORARY_STATE_DIR": str(tmp_path / "operator"),
        "LORARY_SECRET_KEY": SECRET_KEY,
        "LORARY_BLOB_URL": settings.blob_url,
        "LORARY_S3_ENDPOINT_URL": place.server.endpoint_url,
        "LORARY_S3_ACCESS_KEY_ID": S3_ADMIN[0],
        "LORARY_S3_SECRET_ACCESS_KEY": S3_ADMIN[1],
        "BACKUP_BUCKET": place.url,
        "PATH": f"{tmp_path / 'bin'}:{Path(pgserver.__file__).parent / 'pginstall' / 'bin'}:{os.environ['PATH']}",
    }
    names = ("database_url", "database_system_url", "database_owner_url")
    old = {f"LORARY_{name.upper()}": getattr(settings, name) for name in names}
    must(make_shell(tmp_path, environment | old)(commands("postgresql backup")))
    assert len(place.keys()) == len(before)
    store = open_blob_store(settings)
    for tenant_id, sha256 in before:
        store.delete(tenant_id, sha256)
    folder = Path("/tmp") / f"lorary-pg-{uuid4().hex[:8]}"
    folder.mkdir(mode=0o755)
    server = PostgreSQL(folder)
    try:
        with server.empty_database() as name:
            urls = server.urls(name)
            shell = make_shell(tmp_path, environment | {f"LORARY_{key.upper()}": value for key, value in urls.items()})
            must(shell(commands("postgresql restore")))
            found = findings(shell)
            assert (found["blobs"]["status"], found["blobs"]["detail"]) == ("ok", "4 of 4 hashed and equal")
            assert found["secrets"]["status"] == "ok"
            assert stored(store) == before
            check_restored(settings.model_copy(update=urls), acme)
            again = settings.model_copy(update=urls)
            store.delete(*next(key for key in before if key[1] == digest))
            damaged = findings(shell)["blobs"]
            assert [item.partition("/")[2] for item in damaged["items"]] == [digest]
            assert again.database_url != settings.database_url
            wrong = make_shell(
                tmp_path,
                environment | {f"LORARY_{key.upper()}": value for key, value in urls.items()} | {"LORARY_SECRET_KEY": uuid4().hex * 2},
            )
            assert findings(wrong)["secrets"]["status"] == "failed"
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
