"""The chart as its tests see it: packaged as `helm package` does, rendered by Helm's own SDK, and what is found in the result."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from helm_python import Chart

from tests.helm.generate import CHART

Manifest = dict[str, Any]
EXAMPLES = ("production", "trial", "everything")
NOTES = "lorary/templates/NOTES.txt"
CUSTOM = ("keda.sh", "monitoring.coreos.com", "gateway.networking.k8s.io")
"""Kinds that Kubernetes itself does not know; tests/helm/custom.json says what we use of them."""


@functools.cache
def packaged() -> Chart:
    """Through the archive: what .helmignore drops is not there, as for everybody who installs it."""
    with tempfile.TemporaryDirectory() as folder:
        with Chart.load(CHART) as source:
            archive = source.save(folder)
        return Chart.load(archive)


def example(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())
    return values


def production(**changes: Any) -> dict[str, Any]:
    return merged(example("production"), changes)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays one values file over another."""
    out = dict(values)
    for name, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = merged(out[name], change) if both else change
    return out


def files(values: Mapping[str, Any]) -> dict[str, str]:
    return packaged().render(dict(values), name="demo", namespace="ml")


def render(values: Mapping[str, Any]) -> list[Manifest]:
    return [manifest for path, text in files(values).items() if path != NOTES for manifest in yaml.safe_load_all(text) if manifest]


@functools.cache
def _rendered(name: str) -> str:
    return json.dumps(render(example(name)))


def rendered(name: str) -> list[Manifest]:
    """An example, rendered once; a copy, so that a test may change it."""
    manifests: list[Manifest] = json.loads(_rendered(name))
    return manifests


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    found = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"].startswith(f"demo-lorary{name}")]
    exact = [each for each in found if each["metadata"]["name"] == f"demo-lorary{name}"] or found
    assert len(exact) == 1, f"{kind} demo-lorary{name}: {[each['metadata']['name'] for each in found]}"
    return exact[0]


def kinds(manifests: list[Manifest], kind: str) -> list[str]:
    return sorted(each["metadata"]["name"].removeprefix("demo-lorary") for each in manifests if each["kind"] == kind)


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(name, pod spec) of everything that runs."""
    for each in manifests:
        name = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield name, each["spec"]
        elif "template" in each["spec"] if isinstance(each.get("spec"), dict) else False:
            yield name, each["spec"]["template"]["spec"]


def is_ours(pod: Manifest) -> bool:
    """Not one of the trial's official images."""
    return any("lorary-" in container["image"] for container in pod["containers"])


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def container(manifest: Manifest, name: str) -> Manifest:
    pod = manifest["spec"]["template"]["spec"] if "template" in manifest["spec"] else manifest["spec"]
    found: Manifest = next(each for each in containers(pod) if each["name"] == name)
    return found


def variables(container: Manifest) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", [])}


def secret_files(pod: Manifest) -> dict[str, str]:
    """File name -> `secret/entry` of the projected secrets of a pod."""
    volume = next((each for each in pod["volumes"] if each["name"] == "secrets"), {"projected": {"sources": []}})
    return {
        item["path"]: f"{source['secret']['name']}/{item['key']}"
        for source in volume["projected"]["sources"]
        for item in source["secret"]["items"]
    }
