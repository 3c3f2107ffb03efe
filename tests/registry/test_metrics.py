"""What the registry exports: that it counts what happened, under labels that nobody can multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import httpx2
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event
from starlette.testclient import TestClient

from registry.db import Database
from registry.metrics import METRICS
from registry.metrics_listener import exported, listening
from registry.serving.models import Replica
from registry.state_metrics import StateMetrics
from registry.wire import WIRE_VERSION
from tests.brokers import free_port
from tests.registry.adapters.conftest import acme, base_model, operator, work, worker
from tests.registry.adapters.pushing import Pusher, adapter, nan_adapter
from tests.registry.conftest import MakeTenant, bearer

__all__ = ["acme", "base_model", "operator", "work", "worker"]

Labels = dict[str, str]


def value(name: str, **labels: str) -> float:
    return METRICS.get_sample_value(name, labels) or 0.0


def labelsets(families: Iterable[Metric]) -> list[tuple[str, Labels]]:
    return [(sample.name, sample.labels) for family in families for sample in family.samples]


@pytest.mark.sqlite
def test_requests_are_counted_by_template_never_by_path(client: TestClient, make_tenant: MakeTenant) -> None:
    key = bearer(make_tenant("acme"))
    route = {"method": "GET", "route": "/api/v1/adapters/{name}/versions/{number}"}
    before = value("lorary_http_requests_total", status="404", **route)
    strange = {"method": "other", "route": "unmatched", "status": "404"}
    before_strange = value("lorary_http_requests_total", **strange)
    for name in ("one", "two", "three"):
        assert client.get(f"/api/v1/adapters/{name}/versions/1", headers=key).status_code == 404
        client.request(f"BREW{name}".upper(), f"/nothing/here/{name}")
    assert value("lorary_http_requests_total", status="404", **route) == before + 3
    assert value("lorary_http_requests_total", **strange) == before_strange + 3
    assert value("lorary_http_request_duration_seconds_count", **route) >= 3
    assert value("lorary_http_requests_in_flight") == 0


@pytest.mark.sqlite
def test_every_route_is_named_as_the_openapi_document_names_it(client: TestClient) -> None:
    documented = set(client.get("/openapi.json").json()["paths"])
    called = {path.replace("{", "").replace("}", "") for path in documented}
    for path in called:
        client.get(path)
        client.post(path)
    seen = {labels["route"] for name, labels in labelsets(METRICS.collect()) if name == "lorary_http_requests_total"}
    assert documented <= seen
    assert not seen & (called - documented), "a path that somebody called became a label"


@pytest.mark.sqlite
def test_a_push_its_refusal_and_its_bytes_are_counted(acme: Pusher, work: Callable[[], int]) -> None:
    names = {
        "created": ("lorary_pushes_total", {"outcome": "created"}),
        "repeated": ("lorary_pushes_total", {"outcome": "repeated"}),
        "refused": ("lorary_pushes_total", {"outcome": "refused"}),
        "ready": ("lorary_gate_outcomes_total", {"stage": "job", "code": "ready"}),
        "nan": ("lorary_gate_outcomes_total", {"stage": "job", "code": "not_finite"}),
        "dora": ("lorary_gate_outcomes_total", {"stage": "push", "code": "dora"}),
        "in": ("lorary_blob_bytes_total", {"direction": "in"}),
        "out": ("lorary_blob_bytes_total", {"direction": "out"}),
        "run": ("lorary_worker_jobs_total", {"kind": "validate_version", "outcome": "finished"}),
        "claimed": ("lorary_worker_claims_total", {"found_by": "poll", "result": "claimed"}),
    }
    before = {key: value(name, **labels) for key, (name, labels) in names.items()}
    good = adapter()
    assert [acme.push("pirate", good).status_code, acme.push("pirate", good).status_code] == [201, 200]
    acme.push("bad", nan_adapter(1))
    assert acme.push("dora", adapter(2).with_config(use_dora=True)).status_code == 422
    assert work() == 2
    sent = sum(map(len, good.files.values()))
    assert acme.call("GET", "/adapters/pirate/versions/1/files/adapter_model.safetensors").status_code == 200
    grown = {key: value(name, **labels) - before[key] for key, (name, labels) in names.items()}
    assert grown.pop("in") > 2 * sent
    assert grown.pop("out") == len(good.files["adapter_model.safetensors"])
    assert grown == {"created": 2, "repeated": 1, "refused": 1, "ready": 1, "nan": 1, "dora": 1, "run": 2, "claimed": 2}


@pytest.mark.postgresql
def test_backlogs_are_the_tables_across_tenants(acme: Pusher, client: TestClient, make_tenant: MakeTenant, work: Callable[[], int]) -> None:
    other = Pusher(client, bearer(make_tenant("globex")))
    for pusher in (acme, other):
        assert pusher.push("pirate", adapter()).status_code == 201
    own = client.app.state.database  # type: ignore[attr-defined]
    found = samples(StateMetrics(own, replica_ttl_s=15))
    assert found["lorary_database_up", ()] == 1
    assert found["lorary_jobs", ("validate_version", "queued")] == 2
    assert found["lorary_jobs_oldest_queued_seconds", ("validate_version",)] >= 0
    assert found["lorary_replicas", ("live",)] == 0
    assert found["lorary_webhooks_pending", ()] == 0
    assert work() == 2
    assert ("lorary_jobs", ("validate_version", "queued")) not in samples(StateMetrics(own, replica_ttl_s=15))
    assert found["lorary_database_connections_limit", ("app",)] > 0


@pytest.mark.sqlite
def test_a_scrape_asks_the_database_seldom_and_a_replica_that_is_silent_shows(
    client: TestClient, acme: Pusher, database: Database, replica_token: str
) -> None:
    base = {"base_digest": acme.get("/base-models/tiny")["base_digest"], "wire_version": WIRE_VERSION}
    body = {**base, "url": "http://127.0.0.1:1", "max_rank": 8, "num_pages": 4, "page_bytes": 1024}
    welcome = client.post("/api/v1/replicas", json=body, headers=bearer(replica_token)).json()
    report = {"wire_version": WIRE_VERSION, "sequence": 1, "state": "ready", "num_queued": 0, "num_running": 0, "num_free_pages": 4}
    client.post(f"/api/v1/replicas/{welcome['replica_id']}/heartbeat", json=report, headers=bearer(replica_token)).raise_for_status()
    assert samples(StateMetrics(database, replica_ttl_s=60))["lorary_replicas", ("live",)] == 1
    with database.write() as session:
        session.query(Replica).update({"heartbeat_at": database_ago(session)})
    collector = StateMetrics(database, replica_ttl_s=60, max_age_s=3600)
    with statements(database) as seen:
        first = samples(collector)
        asked = len(seen)
        assert samples(collector) == first
    assert first["lorary_replicas", ("silent",)] == 1
    assert 0 < asked <= 8
    assert len(seen) == asked, "the second scrape asked again"


@pytest.mark.sqlite
def test_a_database_that_is_away_costs_the_backlogs_alone(database: Database, tmp_path) -> None:
    broken = Database(f"sqlite:///{tmp_path / 'absent' / 'db.sqlite3'}")
    found = samples(StateMetrics(broken, replica_ttl_s=15))
    assert found["lorary_database_up", ()] == 0
    assert not [name for name, _ in found if name.startswith("lorary_jobs")]
    broken.close()


@pytest.mark.sqlite
def test_the_listener_answers_metrics_and_nothing_else_and_is_off_without_a_port(database: Database) -> None:
    with listening("127.0.0.1", 0, registry=exported()) as port:
        assert port == 0
    port = free_port()
    with listening("127.0.0.1", port, registry=exported()), httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        families = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
        assert {"lorary_http_requests", "lorary_build_info", "process_cpu_seconds"} <= families
        assert client.get("/api/v1/whoami").status_code == 404
        with pytest.raises(OSError, match="LORARY_METRICS_PORT"), listening("127.0.0.1", port, registry=exported()):
            pass


def samples(collector: StateMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(sample.name, tuple(sample.labels.values())): sample.value for family in collector.collect() for sample in family.samples}


def database_ago(session):
    import datetime as dt

    from registry.db import database_time

    return database_time(session) - dt.timedelta(seconds=120)


@contextmanager
def statements(database: Database):
    seen: list[str] = []

    def note(_connection, _cursor, statement, *_rest) -> None:
        seen.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
