"""The parts that a trial brings along: keys in our form, and servers that start with just these arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from registry.blobs.service import open_blob_store
from registry.blobs.store import BlobStore
from registry.config import S3Settings, Settings
from registry.errors import RegistryError
from registry.tenants.keys import key_id_of
from tests.brokers import redis_program
from tests.helm.charts import NOTES, container, example, files, kinds, one, production, render, rendered, variables
from tests.servers import free_ports


def test_nothing_of_a_trial_is_in_a_production_installation() -> None:
    assert not any("trial" in each["metadata"]["name"] for each in rendered("production"))
    assert kinds(rendered("production"), "Secret") == []
    assert "TRIAL" not in files(production())[NOTES]
    assert "TRIAL PARTS ARE ON" in files(example("trial"))[NOTES]


def test_keys_of_a_trial_are_api_keys_of_this_registry() -> None:
    """The checksum is computed by a template; the registry must find it right, every time."""
    seen = set()
    for _ in range(5):
        keys = one(render(example("trial")), "Secret", "-trial-keys")["stringData"]
        assert len(keys["secret-key"]) >= 32
        seen |= {keys["admin-key"], keys["replica-key"]}
    assert len({key_id_of(token) for token in seen}) == 10


def test_all_parts_of_a_trial_agree_on_their_secrets_and_addresses() -> None:
    manifests = rendered("trial")
    database = one(manifests, "Secret", "-trial-database")["stringData"]
    broker = one(manifests, "Secret", "-trial-broker")["stringData"]
    store = one(manifests, "Secret", "-trial-s3")["stringData"]
    identity = json.loads(store["s3.json"])["identities"][0]["credentials"][0]
    assert identity == {"accessKey": store["access-key-id"], "secretKey": store["secret-access-key"]}
    assert f"requirepass {broker['password']}\n" in broker["redis.conf"]
    assert f":{broker['password']}@demo-lorary-trial-redis." in broker["url"]
    assert (
        database["owner-url"]
        == f"postgresql://lorary_owner:{database['password']}@demo-lorary-trial-postgresql.ml.svc.cluster.local:5432/lorary"
    )
    users = {name: database[name].partition("//")[2].partition(":")[0] for name in ("owner-url", "app-url", "system-url")}
    assert users == {"owner-url": "lorary_owner", "app-url": "lorary_app", "system-url": "lorary_system"}
    env = variables(container(one(manifests, "Deployment", "-api"), "api"))
    assert env["LORARY_S3_ENDPOINT_URL"].startswith("http://demo-lorary-trial-s3.ml.svc.")
    assert env["LORARY_S3_DIRECT_UPLOADS"] == "false", "clients cannot reach a store inside the cluster"
    services = {each["metadata"]["name"] for each in manifests if each["kind"] == "Service"}
    assert {"demo-lorary-trial-postgresql", "demo-lorary-trial-redis", "demo-lorary-trial-s3"} <= services


@contextmanager
def running(arguments: list[str], *, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.full
def test_the_store_starts_with_these_arguments_and_takes_a_blob_without_a_bucket(tmp_path: Path) -> None:
    """The ports are others here, because the machine may have one of its own."""
    manifests = rendered("trial")
    secret = one(manifests, "Secret", "-trial-s3")["stringData"]
    (tmp_path / "data").mkdir()
    (tmp_path / "s3.json").write_text(secret["s3.json"])
    given = container(one(manifests, "StatefulSet", "-trial-s3"), "seaweedfs")
    assert given["command"] == ["weed"]
    here = [text.replace("/etc/seaweedfs", str(tmp_path)).replace("=/data", f"={tmp_path}/data") for text in given["args"]]
    services = ("s3", "master", "volume", "filer")
    ports = dict(zip([f"{name}.port{kind}" for name in services for kind in ("", ".grpc")], free_ports(8), strict=True))
    moved = [f"-{name}={port}" for name, port in ports.items()] + ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    weed = str(Path(sys.executable).with_name("weed"))
    with running([weed, *(text for text in here if not text.startswith("-s3.port")), *moved], folder=tmp_path) as process:
        keys = {"access_key_id": secret["access-key-id"], "secret_access_key": secret["secret-access-key"]}
        _until_writable(_store(ports["s3.port"], tmp_path, **keys), process)
        with pytest.raises(RegistryError, match="the blob store refuses this registry"):
            _store(ports["s3.port"], tmp_path, access_key_id="x", secret_access_key="y").check_writable()


def _store(port: int, folder: Path, **keys: Any) -> BlobStore:
    s3 = S3Settings(endpoint_url=f"http://127.0.0.1:{port}", max_attempts=1, **keys)
    return open_blob_store(Settings(state_dir=folder, blob_url="s3://lorary", s3=s3))


def _until_writable(store: BlobStore, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while (complaint := _complaint(store)) is not None:
        assert process.poll() is None, "the store ended"
        assert time.monotonic() < deadline, complaint
        time.sleep(0.5)


def _complaint(store: BlobStore) -> str | None:
    try:
        store.check_writable()
    except (OSError, RegistryError) as error:
        return str(error)
    return None


@pytest.mark.full
def test_redis_starts_with_this_file_and_asks_for_the_password(tmp_path: Path) -> None:
    manifests = rendered("trial")
    secret = one(manifests, "Secret", "-trial-broker")["stringData"]
    assert container(one(manifests, "StatefulSet", "-trial-redis"), "redis")["command"] == ["redis-server", "/etc/redis/redis.conf"]
    port = free_ports(1)[0]
    (tmp_path / "redis.conf").write_text(secret["redis.conf"])
    with running([redis_program(), str(tmp_path / "redis.conf"), "--port", str(port)], folder=tmp_path):
        deadline = time.monotonic() + 20
        while True:
            try:
                assert redis.Redis(port=port, password=secret["password"]).ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
