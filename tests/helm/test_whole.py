"""The trial, run: every pod's own commands with its own variables and files, all at once, beside a database that comes late.

What the chart says about order (nobody deadlocks, everybody waits), secrets, probes, grace periods and `helm test` happens here.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.brokers import RedisServer
from tests.helm.charts import Manifest, example, merged, pods, render
from tests.helm.cluster import Pod
from tests.postgresql import PostgreSQL
from tests.servers import S3_ADMIN, S3_BUCKET, S3Server
from tests.tiny import make_tiny_model

RUNTIME = {"model": {"upstreamNames": ["tests/tiny"]}, "settings": {"threads": 1, "pool_bytes": 2**26, "num_slots": 4}}
REGISTRY = "http://demo-lorary-api.ml.svc.cluster.local:8420"

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture
def manifests() -> list[Manifest]:
    settings = {"job_poll_s": 0.2, "drain_s": 5, "job_drain_s": 2}
    return render(
        merged(example("trial"), {"runtimes": {"smollm2": None, "tiny": RUNTIME}, "settings": settings, "api": {"drainDelayS": 1}})
    )


@pytest.fixture
def database(postgresql_server: PostgreSQL) -> Iterator[str]:
    with postgresql_server.empty_database() as name:
        yield name


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis.log")
    server.start()
    yield server
    server.kill()


def secrets_of(manifests: list[Manifest], *, ours: dict[str, str]) -> dict[str, str]:
    """`secret/entry` -> text, with the addresses of this machine's servers."""
    given = {
        f"{each['metadata']['name']}/{key}": text
        for each in manifests
        if each["kind"] == "Secret"
        for key, text in each["stringData"].items()
    }
    assert {f"demo-lorary-trial-{name}" for name in ours} <= given.keys()
    return {**given, **{f"demo-lorary-trial-{name}": text for name, text in ours.items()}}


@pytest.fixture
def secrets(manifests: list[Manifest], database: str, postgresql_server: PostgreSQL, redis: RedisServer) -> dict[str, str]:
    urls = {f"database/{name}-url": postgresql_server.url(database, f"lorary_{name}") for name in ("owner", "app", "system")}
    plain = {name: url.replace("+psycopg", "") for name, url in urls.items()}
    store = {"s3/access-key-id": S3_ADMIN[0], "s3/secret-access-key": S3_ADMIN[1]}
    return secrets_of(manifests, ours={**plain, **store, "broker/url": redis.url()})


@pytest.fixture
def cluster(tmp_path: Path, manifests: list[Manifest], secrets: dict[str, str], s3_server: S3Server) -> Iterator[dict[str, Pod]]:
    """Not started yet. Names are those of workloads without the release's."""
    model = make_tiny_model(tmp_path / "tiny")
    specs = {name.split()[1].removeprefix("demo-lorary-"): spec for name, spec in pods(manifests) if not name.startswith("StatefulSet")}
    replaced = {
        "http://demo-lorary-trial-s3.ml.svc.cluster.local:8333": s3_server.endpoint_url,
        "s3://lorary": f"s3://{S3_BUCKET}/whole",
        "/models/tiny": str(model),
        "0.0.0.0": "127.0.0.1",
    }
    made: dict[str, Pod] = {}
    for name in sorted(specs, key=lambda name: name != "api"):  # its port is in what the others are told
        made[name] = Pod(specs[name], folder=tmp_path / name, secrets=secrets, replaced=replaced)
        replaced |= {REGISTRY: f"http://127.0.0.1:{made['api'].ports['http']}"}
    made["api"].replaced |= replaced
    yield made
    for pod in made.values():
        pod.kill()


def named(cluster: dict[str, Pod], prefix: str) -> Pod:
    return next(pod for name, pod in cluster.items() if name.startswith(prefix))


def until(holds: Callable[[], bool], *, cluster: dict[str, Pod], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "\n".join(f"== {name}\n{pod.log()[-1500:]}" for name, pod in cluster.items() if pod.has_begun)
        time.sleep(0.2)


def answers(pod: Pod, probe: str) -> bool:
    """What the kubelet asks of the first container."""
    where = pod.spec["containers"][0][probe]["httpGet"]
    try:
        return httpx2.get(f"http://127.0.0.1:{pod.ports[where['port']]}{where['path']}", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


def test_everything_started_at_once_comes_up_answers_and_goes(
    cluster: dict[str, Pod], database: str, postgresql_server: PostgreSQL, manifests: list[Manifest]
) -> None:
    postgresql_server.refuse_connections(database)
    migrate, register, test = (named(cluster, name) for name in ("migrate", "register-tiny", "test"))
    for pod in cluster.values():
        if pod is not test:
            pod.start()
    time.sleep(3)
    assert not answers(cluster["api"], "readinessProbe"), "it waits: there is no database"
    postgresql_server.accept_connections(database)
    assert migrate.wait(timeout_s=60) == 0, migrate.log()
    serving = [cluster["api"], cluster["worker-cpu"], cluster["runtime-tiny"]]
    until(lambda: all(answers(pod, "readinessProbe") for pod in serving), cluster=cluster)
    assert all(answers(pod, "livenessProbe") for pod in serving)
    assert register.wait(timeout_s=60) == 0, register.log()
    test.start()
    assert test.wait(timeout_s=60) == 0, test.log()
    _chat(cluster["api"], manifests)
    for pod in reversed(serving):
        pod.terminate()
        assert pod.code in (0, -signal.SIGTERM), pod.log()[-2000:]  # uvicorn raises the signal again when all is done
    assert "Application shutdown complete" in cluster["api"].log()


def _chat(api: Pod, manifests: list[Manifest]) -> None:
    """As an operator makes a tenant with the trial's key, and its user asks the base model."""
    admin = next(each for each in manifests if each["metadata"]["name"] == "demo-lorary-trial-keys")["stringData"]["admin-key"]
    with httpx2.Client(
        base_url=f"http://127.0.0.1:{api.ports['http']}", headers={"Authorization": f"Bearer {admin}"}, timeout=60
    ) as client:
        assert client.post("/api/v1/tenants", json={"name": "acme"}).status_code == 201
        asked: dict[str, Any] = {"name": "ci", "scopes": ["inference"]}
        token = client.post("/api/v1/keys", json=asked, headers={"X-Lorary-Tenant": "acme"}).json()["token"]
        message = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        reply = client.post("/v1/chat/completions", json=message, headers={"Authorization": f"Bearer {token}"})
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] >= 1
