"""What a replica exports, over the real engine: requests, tokens, tiers, and the names that vLLM-aware routers read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.server.metrics import RuntimeMetrics
from tests.runtime.server.conftest import World
from tests.runtime.server.replica import BASE_DIGEST, TENANT, Replica, engine_replica, grant, wait_until

Sample = tuple[str, tuple[tuple[str, str], ...]]
BODY = {"model": "m", "prompt": "x", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


def source_of(world: World) -> LocalSource:
    source = LocalSource(base_digest=BASE_DIGEST)
    assert tuple(source.add(folder, tenant=TENANT) for folder in world.folders) == world.adapters
    return source


def scrape(replica: Replica) -> dict[Sample, float]:
    text = replica.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def at(found: dict[Sample, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_requests_tokens_and_adapters_are_told(world: World, model_dir: Path) -> None:
    with engine_replica(model_dir, source_of(world)) as replica:
        assert replica.post("/v1/completions", BODY).status_code == 200
        adapter, rank = world.adapters[0], json.loads((world.folders[0] / "adapter_config.json").read_text())["r"]
        assert replica.post("/v1/completions", BODY, token=grant(adapter)).status_code == 200
        assert replica.post("/v1/completions", {**BODY, "max_tokens": -1}).status_code == 400
        assert replica.post("/v1/completions", BODY, token="no grant").status_code == 401
        wait_until(lambda: replica.loop.state().counts.num_generated_tokens == 10)
        found = scrape(replica)
        name = f"{adapter.tenant}/{adapter.form_digest}"
    assert at(found, "lorary_runtime_requests_total", endpoint="completions", outcome="finished") == 2
    assert at(found, "lorary_runtime_requests_total", endpoint="completions", outcome="refused") == 1
    assert at(found, "lorary_runtime_grants_refused_total", code="grant_malformed") == 1
    assert at(found, "lorary_runtime_generated_tokens_total") == 10
    assert at(found, "lorary_runtime_prompt_tokens_total") == 2
    assert [at(found, "lorary_runtime_time_to_first_token_seconds_count", of=of) for of in ("base", "adapter")] == [1, 1]
    assert at(found, "lorary_runtime_inter_token_seconds_count") == 8
    assert at(found, "lorary_runtime_adapter_loads_total") == 1
    assert at(found, "lorary_runtime_adapter_pulls_total", result="registry") == 1
    assert at(found, "lorary_runtime_adapter_pull_bytes_total") > 0
    assert at(found, "lorary_runtime_adapters", tier="pool") == 1
    assert at(found, "lorary_runtime_ready", part="admitting") == 1
    steps = at(found, "lorary_runtime_batch_requests_count")
    assert steps == at(found, "lorary_runtime_batch_requests_bucket", le="+Inf") >= 10
    pages = [at(found, "lorary_runtime_pool_pages", use=use) for use in ("free", "kv", "adapter", "idle_adapter")]
    assert (pages[1], pages[2]) == (0, 0)
    assert pages[3] > 0
    assert at(found, "vllm:lora_adapter_loaded", adapter_name=name, level="gpu", pinned="false", rank=str(rank)) == 1
    assert at(found, "vllm:num_gpu_loaded_lora_adapters") == 1
    assert at(found, "vllm:max_gpu_lora_adapters") == 4


def test_adapters_in_hand_are_listed_as_vllm_lists_them(world: World, model_dir: Path) -> None:
    endless = {**BODY, "max_tokens": 4000}
    adapter = world.adapters[0]
    with engine_replica(model_dir, source_of(world)) as replica:
        with replica.streaming("/v1/completions", endless, token=grant(adapter)) as response:
            lines = response.iter_lines()  # kept: a dropped iterator closes the connection
            next(lines)
            wait_until(lambda: replica.loop.state().running_adapters == {adapter})
            found = scrape(replica)
        replica.wait_idle()
    ((labels, told_at),) = [(dict(key[1]), value) for key, value in found.items() if key[0] == "vllm:lora_requests_info"]
    assert labels == {"max_lora": "4", "waiting_lora_adapters": "", "running_lora_adapters": f"{adapter.tenant}/{adapter.form_digest}"}
    assert told_at > 1.7e9
    assert at(found, "vllm:num_requests_running") == 1
    assert 0 < at(found, "vllm:kv_cache_usage_perc") < 1


def test_series_are_as_many_whatever_clients_send(world: World, model_dir: Path) -> None:
    with engine_replica(model_dir, source_of(world)) as replica:
        replica.post("/v1/completions", BODY)
        replica.post("/v1/completions", BODY, token="x")
        before = set(scrape(replica))
        for number, text in itertools.product(range(3), ("a", "b")):
            replica.post("/v1/completions", {**BODY, "model": f"{text}{number}", "prompt": text}, token=grant(model=f"m{number}"))
            replica.get(f"/v1/{text}/{number}")
            replica.post("/v1/completions", BODY, token=f"x{number}{text}")
        assert set(scrape(replica)) == before


@pytest.mark.parametrize("code", ["grant_expired", "grant_of_somebodys_invention"])
def test_an_unknown_grant_code_is_other(model_dir: Path, code: str) -> None:
    with engine_replica(model_dir, LocalSource(base_digest=BASE_DIGEST)) as replica:
        metrics = RuntimeMetrics(replica.loop.state, replica.health)
        metrics.grant_refused(code)
        shown = code if code == "grant_expired" else "other"
        assert f'lorary_runtime_grants_refused_total{{code="{shown}"}} 1.0' in metrics.exposition("")[0].decode()
