"""The chart lints, its values are closed, and what it renders is what three versions of Kubernetes take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from helm_python import lint
from helm_python.errors import HelmError

from tests.helm import generate
from tests.helm.charts import CUSTOM, EXAMPLES, example, files, packaged, production, render, rendered

KUBERNETES = ("1.31", "1.34", "1.37")
OPEN = {"kubernetes", "volume", "global"}
"""Where a part of Kubernetes' own API is handed on; `test_kubernetes_takes_it` checks those."""
RECOMMENDED = {"icon is recommended"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_lints_strictly(name: str) -> None:
    report = lint(generate.CHART, example(name), strict=True, kube_version="v1.31.0")
    assert report["errors"] == []
    assert {message["error"] for message in report["messages"]} <= RECOMMENDED


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_kubernetes_takes_it(name: str, version: str) -> None:
    for manifest in rendered(name):
        if not manifest["apiVersion"].startswith(CUSTOM):
            kubernetes_validate.validate(manifest, version, strict=True)


def test_custom_kinds_are_what_we_know_of_them() -> None:
    known = json.loads((Path(__file__).parent / "custom.json").read_text())
    found = set()
    for manifest in rendered("everything"):
        if manifest["apiVersion"].startswith(CUSTOM):
            jsonschema.validate(manifest["spec"], known[manifest["kind"]])
            found.add(manifest["kind"])
    assert found == known.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_names_are_unique_short_and_in_the_release_namespace(name: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered(name)]
    assert len(set(names)) == len(names)
    assert all(len(each) <= 63 for _kind, each in names)
    assert {each["metadata"]["namespace"] for each in rendered(name)} == {"ml"}
    assert all(each["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo" for each in rendered(name))


def test_long_names_stay_within_what_kubernetes_allows() -> None:
    values = {**production(), "fullnameOverride": "a" * 40}
    values["runtimes"] = {"b" * 30: example("production")["runtimes"]["smollm2"]}
    assert all(len(each["metadata"]["name"]) <= 63 for each in render(values))


# ---- values ----


def test_the_package_has_its_schema_and_not_the_images() -> None:
    assert packaged().schema == json.loads(generate.SCHEMA.read_text())
    names = {each["name"] for each in packaged().files}
    assert not any(name.startswith("images/") for name in names)
    assert "README.md" in names


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"replicas": 3}, "replicas"),
        ({"api": {"replicas": "three"}}, "replicas"),
        ({"api": {"replica": 3}}, "replica"),
        ({"settings": {"max_uplaod_bytes": 1}}, "max_uplaod_bytes"),
        ({"settings": {"database_url": "postgresql://x"}}, "database_url"),
        ({"settings": {"job_lease_s": 0}}, "job_lease_s"),
        ({"workers": {"cpu": {"queue": "cpu"}}}, "queue"),
        ({"workers": {"cpu": {"keda": {"minReplicas": 0}}}}, "minReplicas"),
        ({"workers": {"Cpu": {}}}, "Cpu"),
        ({"runtimes": {"smollm2": {"settings": {"max_rnak": 8}}}}, "max_rnak"),
        ({"runtimes": {"smollm2": {"model": {"fetch": {"repo": "a/b"}}}}}, "repo"),
        ({"s3": {"url": "https://bucket"}}, "url"),
        ({"images": {"api": {"digest": "sha256:12"}}}, "digest"),
        ({"networkPolicy": {"egress": {"databasePorts": []}}}, "databasePorts"),
        ({"api": {"resources": {"limits": {"cpus": "1"}}}}, "cpus"),
        ({"api": {"tolerations": [{"operater": "Exists"}]}}, "operater"),
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(HelmError, match=says):
        files(production(**wrong))


def test_every_object_of_the_schema_is_closed() -> None:
    schema = json.loads(generate.SCHEMA.read_text())
    objects = list(_objects(schema, "values"))
    assert len(objects) > 50
    loose = {name for name, each in objects if each.get("additionalProperties", True) is True}
    assert {name.rsplit(".", 1)[-1] for name in loose} == OPEN


def _objects(schema: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield name, schema
        for key, each in schema.items():
            yield from _objects(each, f"{name}.{key}")
    elif isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from _objects(each, f"{name}.{index}")


def test_schema_and_readme_follow_the_programs_and_values() -> None:
    due = "run `python -m tests.helm.generate` and commit what it writes"
    assert generate.schema_text() == generate.SCHEMA.read_text(), due
    assert generate.readme_text() == generate.README.read_text(), due


def test_the_default_values_fit_the_schema_and_say_what_is_missing() -> None:
    packaged().validate_schema({})
    with pytest.raises(HelmError, match=r"database\.existingSecret is empty"):
        files({})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"s3": {"url": ""}}, "s3.url is empty"),
        ({"adminKey": {"existingSecret": ""}}, "adminKey.existingSecret is empty"),
        ({"replicaKey": {"existingSecret": ""}}, "replicaKey.existingSecret is empty"),
        ({"trial": {"postgresql": {"enabled": True}}}, "both set"),
        ({"trial": {"s3": {"enabled": True}}}, "both set"),
        ({"trial": {"redis": {"enabled": True}}}, "both set"),
        ({"modelCache": {"enabled": False}}, "fetch copies into the model cache"),
        ({"runtimes": {"smollm2": {"model": {"fetch": {"revision": ""}}}}}, "pin a commit"),
        ({"metrics": {"serviceMonitor": {"enabled": True}}}, "closed doors"),
    ],
)
def test_values_that_cannot_work_together_are_refused_with_what_to_do(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(HelmError, match=says):
        files(production(**wrong))
