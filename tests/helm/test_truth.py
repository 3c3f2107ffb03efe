"""What the chart says of the programs is so: every variable is read, every command exists, every probe answers, the query counts."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import typer
from pydantic import SecretStr

from gpu_runtime.config import RuntimeConfig
from gpu_runtime.server.app import create_app as create_runtime_app
from registry.app import create_app
from registry.cli.main import app as command
from registry.config import CliSettings, FirstKeys, S3Settings, Settings
from registry.db import Database, open_database
from registry.jobs import service as jobs
from tests.helm import generate
from tests.helm.charts import EXAMPLES, container, containers, is_ours, one, pods, rendered, secret_files, variables
from tests.postgresql import PostgreSQL
from tests.servers import free_ports
from workers.watching import watched

OURS = {"LORARY_SECRETS_DIR", "POD_IP"}
OTHERS = {"HOME", "NUMBA_CACHE_DIR", "HF_HUB_DISABLE_TELEMETRY", "HF_ENDPOINT", "HF_TOKEN_PATH", "OTEL_EXPORTER_OTLP_ENDPOINT"} | {
    "TZ",
    "HTTPS_PROXY",
}


def read_by_programs() -> set[str]:
    prefixed = {"LORARY_S3_": S3Settings.model_fields, "LORARY_RUNTIME_": [field.name for field in fields(RuntimeConfig)]}
    names = {f"{prefix}{name}".upper() for prefix, known in prefixed.items() for name in known}
    return names | {f"LORARY_{name}".upper() for cls in (Settings, CliSettings, FirstKeys) for name in cls.model_fields}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_variable_is_one_that_a_program_reads(name: str) -> None:
    for who, pod in pods(rendered(name)):
        for each in containers(pod) if is_ours(pod) else []:
            assert set(variables(each)) <= read_by_programs() | OURS | OTHERS, (who, each["name"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_secret_file_is_a_setting_in_lower_case(name: str) -> None:
    for who, pod in pods(rendered(name)):
        assert {path.upper() for path in secret_files(pod)} <= read_by_programs(), who


def test_what_a_pod_is_given_makes_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The values as text, as a process gets them, are accepted by the classes that read them."""
    manifests = rendered("everything")
    for name in ("lorary_secret_key", "lorary_s3_secret_access_key"):
        (tmp_path / name).write_text("x" * 40)
    for variable, value in variables(container(one(manifests, "Deployment", "-api"), "api")).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("LORARY_SECRETS_DIR", str(tmp_path))
    settings = Settings()
    assert settings.max_upload_bytes == 20 * 2**30
    assert settings.drain_s == 45
    assert settings.hub_endpoints == ("https://hub.example.com",)
    assert settings.s3.addressing_style == "virtual"
    assert settings.s3.secret_access_key.get_secret_value() == "x" * 40
    assert settings.metrics_port == 9420
    given = variables(container(one(manifests, "Deployment", "-runtime-cached"), "runtime"))
    config = RuntimeConfig.from_environment([], environ={**given, "LORARY_RUNTIME_PUBLIC_URL": "http://10.0.0.1:8100"})
    assert config.num_slots == 128
    assert config.url == "http://10.0.0.1:8100"


def test_what_the_chart_leaves_out_it_sets_itself() -> None:
    """A setting that is neither offered nor set is one that an operator on Kubernetes cannot reach."""
    assert {*generate.SET_BY_CHART} <= set(Settings.model_fields)
    assert {*generate.S3_SET_BY_CHART} <= set(S3Settings.model_fields)
    assert {*generate.RUNTIME_SET_BY_CHART} <= {field.name for field in fields(RuntimeConfig)}
    given = {name for _who, pod in pods(rendered("everything")) for each in containers(pod) for name in variables(each)}
    files = {path.upper() for _who, pod in pods(rendered("everything")) for path in secret_files(pod)}
    chart_sets = {f"LORARY_{name}".upper() for name in generate.SET_BY_CHART - {"s3", "database_busy_timeout_s"}}
    chart_sets |= {f"LORARY_S3_{name}".upper() for name in generate.S3_SET_BY_CHART}
    chart_sets |= {f"LORARY_RUNTIME_{name}".upper() for name in generate.RUNTIME_SET_BY_CHART}
    assert chart_sets <= given | files


# ---- commands ----


def used_commands() -> set[tuple[str, ...]]:
    """The arguments of every container of ours that are a command's names and options, without values."""
    used = set()
    for name in EXAMPLES:
        for _who, pod in pods(rendered(name)):
            for each in containers(pod):
                if is_ours(pod) and "command" not in each:
                    used.add(tuple(each["args"]))
    return used


def test_every_command_exists_with_its_options() -> None:
    root = typer.main.get_command(command)
    assert len(used_commands()) > 8
    for arguments in used_commands():
        found, rest = root, list(arguments)
        while rest and hasattr(found, "commands"):
            found = found.commands[rest.pop(0)]
        options = {option for parameter in found.params for option in parameter.opts}
        assert {each for each in rest if each.startswith("--")} <= options, arguments
        with found.make_context(arguments[0], rest, resilient_parsing=False) as parsed:
            assert parsed.params, arguments


def test_every_command_that_the_docs_name_exists() -> None:
    root = typer.main.get_command(command)
    named = re.findall(r"(?:`|-- )lorary ([a-z][^`|\n]*)", generate.README.read_text())
    assert len(named) > 8
    for text in named:
        found, rest = root, text.split()
        while hasattr(found, "commands"):
            assert rest, f"lorary {text} is no command"
            assert rest[0] in found.commands, f"lorary {text}: there is no {rest[0]}"
            found = found.commands[rest.pop(0)]
            if not rest:
                break
        options = {option for parameter in found.params for option in parameter.opts}
        assert {each for each in rest if each.startswith("--")} <= options, text


def test_every_image_begins_with_the_command_that_pods_give_arguments_to() -> None:
    for name in ("api", "worker", "runtime"):
        text = (generate.CHART / "images" / name / "Dockerfile").read_text()
        assert 'ENTRYPOINT ["lorary"]' in text
        assert f'CMD ["{name}"]' in text


@pytest.mark.full
def test_commands_run() -> None:
    for arguments in {each[:2] if each[0] in ("db", "keys", "base-models") else each[:1] for each in used_commands()}:
        done = subprocess.run([sys.executable, "-m", "registry.cli", *arguments, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Usage: lorary" in done.stdout
    hub = subprocess.run([str(Path(sys.executable).with_name("hf")), "download", "--help"], capture_output=True, text=True, check=False)
    for option in ("--revision", "--local-dir"):
        assert option in hub.stdout


# ---- probes ----


def probes(deployment: dict[str, Any]) -> set[tuple[str, str]]:
    main = deployment["spec"]["template"]["spec"]["containers"][0]
    found = [main[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
    return {(each["path"], each["port"]) for each in found}


def test_probes_and_scrapes_ask_what_answers(tmp_path: Path) -> None:
    manifests = rendered("everything")
    asked = {name: probes(one(manifests, "Deployment", name)) for name in ("-api", "-worker-cpu", "-runtime-cached")}
    assert asked["-api"] == asked["-runtime-cached"] == {("/livez", "http"), ("/readyz", "http")}
    assert asked["-worker-cpu"] == {("/livez", "metrics"), ("/readyz", "metrics")}
    settings = Settings(state_dir=tmp_path, secret_key=SecretStr("k" * 32), metrics_port=free_ports(1)[0])
    assert {"/livez", "/readyz"} <= create_app(settings).openapi()["paths"].keys()
    serving: Any = SimpleNamespace(engine=SimpleNamespace(state=None), health=None)
    assert {"/livez", "/readyz", "/metrics"} <= {getattr(route, "path", "") for route in create_runtime_app(serving).routes}
    database = open_database(settings)
    with watched(settings, database, stop=threading.Event()):
        for path, expected in (("/livez", 200), ("/readyz", 503), ("/metrics", 200)):  # 503: this database has no schema
            assert httpx2.get(f"http://127.0.0.1:{settings.metrics_port}{path}").status_code == expected
    database.close()


# ---- the autoscaler's query ----


def test_the_query_counts_what_is_due_or_running_in_its_queues(postgresql_server: PostgreSQL) -> None:
    query = one(rendered("everything"), "ScaledObject", "-worker-cpu")["spec"]["triggers"][0]["metadata"]["query"]
    with postgresql_server.installation() as name:
        urls = postgresql_server.urls(name)
        database = Database(urls["database_url"], system_url=urls["database_system_url"])

        def count(account: str = "lorary_system") -> int:
            return int(postgresql_server.execute(query, database=name, account=account)[0][0])

        def enqueue(session: Any) -> str:
            return jobs.enqueue(session, kind=jobs.IMPORT_BASE_MODEL, tenant_id=None, subject_id="test", payload={}).id

        try:
            assert count() == 0
            with database.system_write() as session:
                ids = [enqueue(session) for _ in range(5)]
            assert count() == 5
            with database.system_write() as session:
                claim = jobs.claim(session, owner="test", kinds=[jobs.IMPORT_BASE_MODEL], lease_s=60)
                assert claim is not None
            assert count() == 5, "a running job still needs its worker"
            with database.system_write() as session:
                jobs.finish(session, claim)
            others = [each for each in ids if each != claim.job_id]
            with database.system_write() as session:
                jobs.cancel(session, None, others[0])
            assert count() == 3
            postgresql_server.execute(f"UPDATE jobs SET available_at = now() + interval '1 hour' WHERE id = '{others[1]}'", database=name)
            postgresql_server.execute(f"UPDATE jobs SET queue = 'gpu' WHERE id = '{others[2]}'", database=name)
            assert count() == 1
            assert count("lorary_app") == 0, "the application's role sees no tenant's jobs, so the system role must ask"
        finally:
            database.close()
