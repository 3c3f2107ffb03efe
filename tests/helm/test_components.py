"""What each component is given, asked of rendered manifests as a cluster would read them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.helm.charts import (
    EXAMPLES,
    container,
    containers,
    is_ours,
    kinds,
    one,
    pods,
    production,
    render,
    rendered,
    secret_files,
    variables,
)
from tests.helm.generate import CHART

# ---- every pod ----


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_pod_is_restricted_and_has_no_token(name: str) -> None:
    for who, pod in pods(rendered(name)):
        assert pod["automountServiceAccountToken"] is False, who
        assert pod["securityContext"]["runAsNonRoot"] is True, who
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, who
        for each in containers(pod):
            security = each["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, who
            assert security["readOnlyRootFilesystem"] is True, who
            assert security["capabilities"] == {"drop": ["ALL"]}, who
            assert {"requests", "limits"} <= each["resources"].keys(), (who, each["name"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_pod_gets_variables_of_services(name: str) -> None:
    """A Service named lorary-runtime would set LORARY_RUNTIME_PORT=tcp://..., and the runtime would not start."""
    for who, pod in pods(rendered(name)):
        assert pod["enableServiceLinks"] is False, who


@pytest.mark.parametrize("name", EXAMPLES)
def test_secrets_are_files_in_pods_and_never_variables(name: str) -> None:
    for who, pod in pods(rendered(name)):
        for each in containers(pod):
            assert not any("secretKeyRef" in str(value) for value in variables(each).values()), who


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_mount_has_its_volume_and_every_volume_a_mount(name: str) -> None:
    for who, pod in pods(rendered(name)):
        mounted = {mount["name"] for each in containers(pod) for mount in each.get("volumeMounts", [])}
        claimed = {"data"} if who.startswith("StatefulSet") else set()
        assert mounted - claimed == {volume["name"] for volume in pod.get("volumes", [])}, who


def test_a_process_may_write_to_its_state_and_tmp_alone() -> None:
    for who, pod in pods(rendered("production")):
        writable = {mount["mountPath"] for each in containers(pod) for mount in each["volumeMounts"] if not mount.get("readOnly")}
        assert writable <= {"/var/lib/lorary", "/tmp", "/var/cache/lorary", "/models"}, who


# ---- secrets by component ----


def test_each_component_holds_no_more_secrets_than_it_needs() -> None:
    manifests = render(production(secretKey={"existingSecret": "s", "previousKey": "old"}, s3={"existingSecret": "store"}))
    files = {name.split()[1].removeprefix("demo-lorary-").split("-")[0]: set(secret_files(pod)) for name, pod in pods(manifests)}
    serving = {"lorary_database_url", "lorary_database_system_url", "lorary_secret_key", "lorary_secret_key_previous"}
    serving |= {"lorary_broker_url", "lorary_s3_access_key_id", "lorary_s3_secret_access_key"}
    assert files["api"] == serving
    assert files["worker"] == serving, "and not the owner's URL: only the migrate Job may change tables"
    assert files["runtime"] == {"lorary_replica_key"}, "a stolen replica reads no database and signs no grant"
    assert files["register"] == {"lorary_api_key"}
    assert files["test"] == {"lorary_api_key"}
    owner = {"lorary_database_owner_url", "lorary_first_admin_key", "lorary_replica_key"}
    assert files["migrate"] == {each for each in serving if "s3" not in each and "broker" not in each} | owner


def test_secrets_come_from_the_entries_that_values_name() -> None:
    names = {"existingSecret": "db", "appUrlKey": "one", "systemUrlKey": "two", "ownerUrlKey": "three"}
    files = secret_files(one(render(production(database=names)), "Job", "-migrate")["spec"]["template"]["spec"])
    assert files["lorary_database_url"] == "db/one"
    assert files["lorary_database_system_url"] == "db/two"
    assert files["lorary_database_owner_url"] == "db/three"


# ---- migrations ----


def test_migrations_are_no_hook_and_everybody_with_a_database_waits_for_them() -> None:
    """A post-install hook waits for pods that wait for the schema; a pre-install hook for what the same chart brings."""
    for name in EXAMPLES:
        for manifest in rendered(name):
            hook = manifest["metadata"].get("annotations", {}).get("helm.sh/hook")
            assert hook == ("test" if manifest["kind"] == "Pod" else None)
        for who, pod in pods(rendered(name)):
            needs = is_ours(pod) and who.startswith("Deployment") and "lorary_database_url" in secret_files(pod)
            waits = [each["args"][:2] for each in pod.get("initContainers", []) if each["name"] == "wait-for-schema"]
            assert waits == ([["db", "wait"]] if needs else []), who


def test_who_waits_waits_longer_than_the_migrator_waits_for_its_database() -> None:
    manifests = rendered("production")
    wait = container(one(manifests, "Deployment", "-api"), "wait-for-schema")["args"]
    migrate = container(one(manifests, "Job", "-migrate"), "migrate")["args"]
    assert float(wait[3]) > float(migrate[3])


def test_another_image_makes_another_job_and_the_same_values_the_same_one() -> None:
    """A Job's pod cannot be changed, so `helm upgrade` must find either the same Job or a new name."""

    def names(**changes: Any) -> list[str]:
        return kinds(render(production(**changes)), "Job")

    same, later = names(), names(images={"api": {"tag": "0.2.0"}})
    assert names() == same
    assert not set(same) & set(later)
    assert names(api={"replicas": 5}) == same, "what does not concern the Job does not run it again"


def test_without_the_job_pods_wait_all_the_same() -> None:
    manifests = render(production(migrate={"enabled": False}))
    assert not any(name.startswith("-migrate") for name in kinds(manifests, "Job"))
    assert container(one(manifests, "Deployment", "-api"), "wait-for-schema")


# ---- api ----


def test_an_autoscaled_deployment_leaves_its_replicas_to_the_autoscaler() -> None:
    fixed = rendered("production")
    assert one(fixed, "Deployment", "-api")["spec"]["replicas"] == 2
    assert kinds(fixed, "HorizontalPodAutoscaler") == []
    scaled = render(production(api={"autoscaling": {"enabled": True}}))
    assert "replicas" not in one(scaled, "Deployment", "-api")["spec"]
    assert one(scaled, "HorizontalPodAutoscaler", "-api")["spec"]["scaleTargetRef"]["name"] == "demo-lorary-api"


@pytest.mark.parametrize(("replicas", "budgets"), [(1, []), (2, ["-api"]), (5, ["-api"])])
def test_a_budget_for_one_pod_would_block_the_draining_of_nodes(replicas: int, budgets: list[str]) -> None:
    manifests = render(production(api={"replicas": replicas}, workers={"cpu": {"replicas": 1}}))
    assert kinds(manifests, "PodDisruptionBudget") == budgets


@pytest.mark.parametrize(("settings", "more_than"), [({}, 5 + 30), ({"drain_s": 120}, 5 + 120), ({"drain_s": 0.5}, 6)])
def test_the_registry_has_the_time_to_drain(settings: dict[str, float], more_than: float) -> None:
    deployment = one(render(production(settings=settings)), "Deployment", "-api")
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > more_than
    assert variables(container(deployment, "api"))["LORARY_DRAIN_DELAY_S"] == "5"


def test_ingress_and_route_lead_to_the_service() -> None:
    manifests = rendered("everything")
    service = one(manifests, "Service", "-api")
    backend = one(manifests, "Ingress", "")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    route = one(manifests, "HTTPRoute", "")["spec"]["rules"][0]
    assert backend["name"] == service["metadata"]["name"] == route["backendRefs"][0]["name"]
    assert backend["port"]["name"] == service["spec"]["ports"][0]["name"]
    assert route["backendRefs"][0]["port"] == service["spec"]["ports"][0]["port"]
    assert route["timeouts"]["request"] == "0s", "a stream of tokens is longer than a gateway's default"
    assert [port["name"] for port in service["spec"]["ports"]] == ["http"], "metrics are not for those who use the registry"


def test_settings_are_variables_and_whole_numbers_stay_whole() -> None:
    env = variables(container(one(rendered("everything"), "Deployment", "-api"), "api"))
    assert env["LORARY_MAX_UPLOAD_BYTES"] == "21474836480"
    assert env["LORARY_JOB_DRAIN_S"] == "12.5"
    assert env["LORARY_BLOB_REDIRECT"] == "true"


# ---- workers ----


def test_an_entry_of_workers_is_its_defaults_and_what_it_says() -> None:
    manifests = render(production(workers={"gpu": {"queues": ["gpu"], "gpu": {"count": 1}, "models": False}}))
    assert kinds(manifests, "Deployment") == ["-api", "-runtime-smollm2", "-worker-cpu", "-worker-gpu"]
    worker = container(one(manifests, "Deployment", "-worker-gpu"), "worker")
    assert variables(worker)["LORARY_WORKER_QUEUES"] == "gpu"
    assert worker["resources"]["limits"] == {"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": 1}
    assert not any(mount["mountPath"] == "/models" for mount in worker["volumeMounts"]), "false beats a default of true"
    assert "nvidia.com/gpu" not in container(one(manifests, "Deployment", "-worker-cpu"), "worker")["resources"]["limits"]


def test_null_takes_an_entry_away() -> None:
    manifests = render(production(workers={"cpu": None, "all": {"queues": ["cpu", "gpu"]}}))
    assert [name for name in kinds(manifests, "Deployment") if "worker" in name] == ["-worker-all"]
    bare = render(production(runtimes={"smollm2": None}))  # of another values file, which Helm does not take away by itself
    assert not any("smollm2" in name or "runtime" in name for kind in ("Deployment", "Job", "NetworkPolicy") for name in kinds(bare, kind))


def test_a_worker_has_the_time_to_give_its_job_back() -> None:
    manifests = render(production(settings={"job_drain_s": 300}))
    assert one(manifests, "Deployment", "-worker-cpu")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 300


def test_running_requests_of_a_replica_have_its_grace_but_for_leaving() -> None:
    manifests = render(production(runtimeDefaults={"terminationGraceS": 120}))
    deployment = one(manifests, "Deployment", "-runtime-smollm2")
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 120
    assert variables(container(deployment, "runtime"))["LORARY_RUNTIME_DRAIN_S"] == "105"


def test_a_scaled_worker_is_scaled_by_its_own_queues_as_the_system_role() -> None:
    manifests = rendered("everything")
    scaled = one(manifests, "ScaledObject", "-worker-cpu")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "demo-lorary-worker-cpu"
    assert "replicas" not in one(manifests, "Deployment", "-worker-cpu")["spec"]
    assert "queue IN ('cpu')" in scaled["triggers"][0]["metadata"]["query"]
    login = one(manifests, "TriggerAuthentication", "-worker-cpu")["spec"]["secretTargetRef"]
    assert login == [{"parameter": "connection", "name": "database", "key": "system-url"}]
    assert one(manifests, "Deployment", "-worker-gpu")["spec"]["replicas"] == 3
    assert kinds(manifests, "ScaledObject") == ["-worker-cpu"]


# ---- runtimes ----


def test_each_runtime_is_a_deployment_with_its_own_model_and_resources() -> None:
    manifests = rendered("everything")
    cached, mounted = (one(manifests, "Deployment", f"-runtime-{name}") for name in ("cached", "mounted"))
    assert one(rendered("production"), "Deployment", "-runtime-smollm2")["spec"]["replicas"] == 1
    assert variables(container(cached, "runtime"))["LORARY_RUNTIME_MODEL_DIR"] == "/models/cached"
    assert variables(container(cached, "runtime"))["LORARY_RUNTIME_HOST_CACHE_BYTES"] == "8589934592"
    assert variables(container(mounted, "runtime"))["LORARY_RUNTIME_MODEL_DIR"] == "/weights/llama"
    assert container(mounted, "runtime")["resources"]["limits"]["nvidia.com/gpu"] == 2
    pod = mounted["spec"]["template"]["spec"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert mounted["spec"]["strategy"] == {"type": "Recreate"}
    assert cached["spec"]["selector"] != mounted["spec"]["selector"]


def test_workers_see_every_base_model_where_runtimes_see_it() -> None:
    """An import reads the folder on the worker's machine; the digest is of what it saw there."""
    manifests = rendered("everything")
    in_worker = {mount["mountPath"] for mount in container(one(manifests, "Deployment", "-worker-cpu"), "worker")["volumeMounts"]}
    assert {"/models", "/weights/llama"} <= in_worker
    mounts = container(one(manifests, "Deployment", "-runtime-mounted"), "runtime")["volumeMounts"]
    assert {mount["mountPath"]: mount.get("readOnly") for mount in mounts}["/weights/llama"] is True
    assert "/models" not in {mount["mountPath"] for mount in mounts}


def test_a_registered_model_is_the_folder_that_is_served() -> None:
    manifests = rendered("everything")
    job = container(one(manifests, "Job", "-register-cached"), "register")
    served = variables(container(one(manifests, "Deployment", "-runtime-cached"), "runtime"))["LORARY_RUNTIME_MODEL_DIR"]
    assert job["args"][-2:] == ["smollm2.instruct", served]
    assert job["args"].count("--upstream-name") == 2
    assert not any("mounted" in name for name in kinds(manifests, "Job")), "register: false"


def test_a_replica_says_where_the_registry_reaches_it() -> None:
    env = variables(container(one(rendered("production"), "Deployment", "-runtime-smollm2"), "runtime"))
    assert env["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert env["LORARY_RUNTIME_PUBLIC_URL"] == "http://$(POD_IP):8100"
    names = list(env)
    assert names.index("POD_IP") < names.index("LORARY_RUNTIME_PUBLIC_URL"), "Kubernetes expands what stands before"


# ---- network ----


def test_every_pod_has_one_policy_that_denies_the_rest() -> None:
    for name in EXAMPLES:
        manifests = rendered(name)
        policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
        for each in manifests:
            template = each if each["kind"] == "Pod" else each.get("spec", {}).get("template")
            if template is None:
                continue
            labels = template["metadata"]["labels"]
            fits = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= labels.items()]
            assert len(fits) == 1, each["metadata"]["name"]
            assert fits[0]["policyTypes"] == ["Ingress", "Egress"]
    assert kinds(render(production(networkPolicy={"enabled": False})), "NetworkPolicy") == []


def test_runtimes_reach_the_registry_and_nothing_that_holds_data() -> None:
    values = production(runtimes={"smollm2": {"model": {"fetch": {"repository": ""}}}})
    policy = one(render(values), "NetworkPolicy", "-runtime")["spec"]
    assert "5432" not in str(policy["egress"])
    assert "443" not in str(policy["egress"])
    assert "'app.kubernetes.io/component': 'api'" in str(policy["egress"])
    assert "'app.kubernetes.io/component': 'api'" in str(policy["ingress"])


def test_peers_are_those_that_values_name() -> None:
    manifests = rendered("everything")
    worker = str(one(manifests, "NetworkPolicy", "-worker-cpu")["spec"]["egress"])
    for cidr in ("10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24", "169.254.0.0/16"):
        assert cidr in worker
    callers, scrapers = one(manifests, "NetworkPolicy", "-api")["spec"]["ingress"]
    assert "monitoring" not in str(callers)
    assert "monitoring" in str(scrapers)
    assert scrapers["ports"] == [{"protocol": "TCP", "port": "metrics"}]
    components = {peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component") for peer in callers["from"]}
    assert {"runtime", "register", "test"} <= components


# ---- watching ----


def test_monitors_find_the_port_that_pods_have() -> None:
    manifests = rendered("everything")
    service = one(manifests, "Service", "-metrics")
    monitor = one(manifests, "ServiceMonitor", "")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    for name in ("-api", "-worker-cpu", "-worker-gpu"):
        template = one(manifests, "Deployment", name)["spec"]["template"]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert {"name": "metrics", "containerPort": 9420, "protocol": "TCP"} in template["spec"]["containers"][0]["ports"]
    replicas = one(manifests, "PodMonitor", "-runtime")["spec"]
    template = one(manifests, "Deployment", "-runtime-cached")["spec"]["template"]
    assert replicas["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert replicas["podMetricsEndpoints"][0]["port"] in {port["name"] for port in template["spec"]["containers"][0]["ports"]}


def test_alerts_and_dashboards_are_the_files_beside_the_chart() -> None:
    manifests = rendered("everything")
    for file in sorted((CHART / "alerts").glob("*.yaml")):
        rule = one(manifests, "PrometheusRule", f"-{file.stem}")
        assert rule["spec"] == yaml.safe_load(file.read_text()), "their own {{ $labels }} is Prometheus' to fill in"
        assert rule["metadata"]["labels"]["release"] == "prometheus"
    boards = one(manifests, "ConfigMap", "-dashboards")
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert boards["data"] == {file.name: file.read_text() for file in (CHART / "dashboards").glob("*.json")}
    assert boards["data"]
    assert kinds(rendered("production"), "PrometheusRule") == kinds(rendered("production"), "ConfigMap") == []


def test_traces_go_to_the_collector_that_is_named_and_the_policies_let_them() -> None:
    everything, silent = rendered("everything"), rendered("production")
    for name, container_name in (("-api", "api"), ("-worker-cpu", "worker"), ("-runtime-cached", "runtime")):
        env = variables(container(one(everything, "Deployment", name), container_name))
        assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector.monitoring:4318"
    for name in ("-api", "-worker-cpu", "-runtime"):
        assert "4318" in str(one(everything, "NetworkPolicy", name)["spec"]["egress"])
        assert "4318" not in str(one(silent, "NetworkPolicy", name)["spec"]["egress"])
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in variables(container(one(silent, "Deployment", "-api"), "api"))
