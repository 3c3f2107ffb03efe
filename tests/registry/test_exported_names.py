"""Dashboards, alerts, runbook and the tables in the READMEs name what the code exports, and labels are of a known, small set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric

from gpu_runtime.adapters.pull import PullCounts
from gpu_runtime.core import AdapterKey
from gpu_runtime.engine.state import EngineCounts, EngineState, ResidentAdapter
from gpu_runtime.server.health import Health
from gpu_runtime.server.metrics import RuntimeMetrics
from registry.config import Settings
from registry.db import Database
from registry.metrics import METRICS
from registry.readiness import Readiness
from registry.state_metrics import state_collectors

ROOT = Path(__file__).resolve().parents[2]
HELM = ROOT / "helm"
# Every label that any of our metrics may have. Whoever adds one says why strangers cannot multiply it.
LABELS = {
    "version": "of the program",
    "method": "known methods or other",
    "route": "templates of the OpenAPI document",
    "status": "HTTP's",
    "outcome": "named in the code",
    "stage": "push, job",
    "code": "codes of the gate, of grants",
    "direction": "in, out",
    "kind": "kinds of jobs",
    "state": "states of rows",
    "found_by": "poll, hint",
    "result": "named in the code",
    "away": "broker, database",
    "part": "parts of readiness",
    "role": "app, system",
    "endpoint": "chat, completions",
    "of": "base, adapter",
    "use": "of pages",
    "tier": "pool, host, disk",
    "generation": "of Python's collector",
}
# Names that are not ours, for routers that read them; bounded by the slots of one replica.
VLLM_LABELS = {"adapter_name", "level", "pinned", "rank", "max_lora", "waiting_lora_adapters", "running_lora_adapters"}
PROMETHEUS_LABELS = {"le", "instance", "job", "pod", "namespace"}
RUNTIME = ("lorary_runtime_", "vllm:")
WORKER = ("lorary_worker_", "lorary_relay_", "lorary_webhook_attempts")
READMES = {"registry": "registry/README.md", "workers": "workers/README.md", "gpu_runtime": "gpu_runtime/README.md"}


@dataclass(frozen=True)
class Exported:
    """One family as a scrape shows it."""

    name: str
    type: str
    labels: tuple[str, ...]
    says: str

    @property
    def shown(self) -> str:
        return f"{self.name}_total" if self.type == "counter" else self.name

    @property
    def samples(self) -> set[str]:
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}.get(self.type, ("",))
        return {f"{self.name}{end}" for end in ends}

    @property
    def house(self) -> str:
        return "gpu_runtime" if self.name.startswith(RUNTIME) else "workers" if self.name.startswith(WORKER) else "registry"

    @property
    def row(self) -> str:
        labels = ", ".join(f"`{label}`" for label in self.labels)
        return f"| `{self.shown}` | {self.type} | {labels} | {self.says} |"


@pytest.fixture
def exported(database: Database, settings: Settings) -> list[Exported]:
    return sorted(_ours([*_process(), *_state(database, settings), *_runtime()]), key=lambda one: one.name)


def _process() -> Iterator[Exported]:
    for collector in METRICS._collector_to_names:
        for family in collector.collect():
            yield _exported(family, getattr(collector, "_labelnames", ()))


def _state(database: Database, settings: Settings) -> Iterator[Exported]:
    for collector in state_collectors(settings, database, Readiness({})):
        yield from (_exported(family) for family in collector.collect())


def _runtime() -> Iterator[Exported]:
    key = AdapterKey("t", "f")
    residents = (ResidentAdapter(key, "pool", 8), ResidentAdapter(AdapterKey("t", "g"), "host"))
    counts = EngineCounts(batch_sizes={2: 1}, pulls=PullCounts())
    state = EngineState("ready", 0, 1, 4, 4, 64, 8, 2, residents, running_adapters=frozenset({key}), counts=counts)
    metrics = RuntimeMetrics(lambda: state, Health(lambda: state, lambda: True))
    for collector in metrics._registry._collector_to_names:
        yield from (_exported(family, getattr(collector, "_labelnames", ())) for family in collector.collect())


def _exported(family: Metric, labels: Iterable[str] = ()) -> Exported:
    given = tuple(labels) or tuple(getattr(family, "_labelnames", ()))
    return Exported(family.name, family.type, given, family.documentation)


def _ours(families: Iterable[Exported]) -> set[Exported]:
    return {one for one in families if one.name.startswith(("lorary_", "vllm:"))}


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that Grafana and Prometheus will ask."""
    dashboards, alerts = sorted((HELM / "dashboards").glob("*.json")), sorted((HELM / "alerts").glob("*.yaml"))
    assert dashboards, "no dashboard"
    assert alerts, "no alerts"
    for path in dashboards:
        for panel in json.loads(path.read_text())["panels"]:
            yield from ((f"{path.name}: {panel['title']}", target["expr"]) for target in panel.get("targets", ()))
    for path in alerts:
        yield from ((f"{path.name}: {rule['alert']}", rule["expr"]) for rule in rules(path))


def rules(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.sqlite
def test_dashboards_and_alerts_ask_for_what_is_exported(exported: list[Exported]) -> None:
    samples = {sample: set(one.labels) for one in exported for sample in one.samples}
    asked = list(expressions())
    assert len(asked) > 40
    for where, expression in asked:
        names = set(re.findall(r"\b(?:lorary_\w+|vllm:\w+)", expression))
        assert names, f"{where}: {expression} asks for nothing of ours"
        unknown = names - samples.keys()
        assert not unknown, f"{where} asks for {unknown}, which nothing exports"
        used = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        used |= set(re.findall(r"[{,]\s*(\w+)(?:=~|!~|!=|=)", expression))
        known = set().union(*(samples[name] for name in names)) | PROMETHEUS_LABELS
        assert used <= known, f"{where} uses labels {used - known}, which {names} do not have"


@pytest.mark.sqlite
def test_dashboards_show_every_metric_of_ours(exported: list[Exported]) -> None:
    asked = " ".join(expression for _, expression in expressions())
    unseen = {one.name for one in exported if one.name.startswith("lorary_") and not any(sample in asked for sample in one.samples)}
    assert unseen <= {
        "lorary_build",
        "lorary_runtime_page_bytes",
        "lorary_runtime_adapter_load_seconds",
        "lorary_runtime_request_duration_seconds",
    }


@pytest.mark.sqlite
def test_label_sets_are_known_and_small(exported: list[Exported]) -> None:
    for one in exported:
        allowed = VLLM_LABELS if one.name.startswith("vllm:") else LABELS.keys()
        assert set(one.labels) <= set(allowed), (
            f"{one.name} has labels {set(one.labels) - set(allowed)}: are they bounded? Say so in LABELS"
        )
        assert not {"tenant", "adapter", "key", "path", "model"} & set(one.labels), one.name


def test_every_alert_has_its_paragraph_and_every_paragraph_its_alert() -> None:
    runbook = (HELM / "RUNBOOK.md").read_text()
    named = [rule["alert"] for path in (HELM / "alerts").glob("*.yaml") for rule in rules(path)]
    assert re.findall(r"^## (\w+)$", runbook, re.MULTILINE) == named
    for path in (HELM / "alerts").glob("*.yaml"):
        for rule in rules(path):
            assert rule["annotations"]["runbook"].endswith(f"RUNBOOK.md#{rule['alert'].lower()}")
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert re.fullmatch(r"\d+[ms]", rule["for"])
    for paragraph in runbook.split("\n## ")[1:]:
        assert "**Do**:" in paragraph, paragraph


@pytest.mark.sqlite
def test_metrics_that_the_runbook_names_are_exported(exported: list[Exported]) -> None:
    named = set(re.findall(r"\blorary_[a-z_]+", (HELM / "RUNBOOK.md").read_text()))
    known = {sample for one in exported for sample in one.samples}
    assert named <= known, named - known


@pytest.mark.sqlite
@pytest.mark.parametrize("house", READMES)
def test_the_readmes_tables_are_the_codes(exported: list[Exported], house: str) -> None:
    """What to put there where it fails: the rows that the message shows."""
    text = (ROOT / READMES[house]).read_text()
    wanted = [one.row for one in exported if one.house == house]
    found = [line for line in text.splitlines() if re.match(r"\| `(?:lorary_|vllm:)", line)]
    assert found == wanted, "\n".join(["the table should be:", *wanted])
