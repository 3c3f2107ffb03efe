"""What Prometheus hears of a replica: requests as the server sees them, the engine as its state tells it.

The engine half counts in plain numbers (`EngineState`, `EngineCounts`); here they get names. Labels are bounded: no model
name, tenant or key, and an adapter's identity (tenant/form digest) only under the names that vLLM-aware routers read, at
most twice as many as there are slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gpu_runtime.core import AdapterKey
from gpu_runtime.engine.state import EngineCounts, EngineState, ResidentAdapter
from gpu_runtime.server.health import Health

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GRANT_CODES = frozenset(
    f"grant_{reason}" for reason in ("missing", "malformed", "signature", "audience", "expired", "future", "replayed", "overflow")
)
OUTCOMES = {200: "finished", 499: "client_left", 503: "unavailable"}


class RuntimeMetrics:
    """Of one application; any thread."""

    def __init__(self, state: Callable[[], EngineState], health: Health) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_EngineMetrics(state, health))
        self._requests = self._counter(
            "requests",
            "Requests that came with a good grant: finished, client_left, refused, unavailable or failed.",
            "endpoint",
            "outcome",
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of the prompts of these requests.")
        self._grants_refused = self._counter("grants_refused", "Requests without a good grant, by what was wrong with it.", "code")
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token, of the base model or of an adapter.",
            "of",
            buckets=FIRST_TOKEN_S,
        )
        self._between = self._histogram("inter_token_seconds", "Between two tokens of one choice.", buckets=BETWEEN_S)
        self._duration = self._histogram("request_duration_seconds", "From a request's arrival to its end.", "endpoint", buckets=REQUEST_S)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The text that a scraper who accepts `accept` reads, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def began(self, *, has_adapter: bool, after_s: float) -> None:
        self._first_token.labels("adapter" if has_adapter else "base").observe(after_s)

    def paused(self, seconds: float) -> None:
        self._between.observe(seconds)

    def first_tokens(self) -> dict[str, float]:
        """How many requests had a first token, and the seconds that they waited for it together."""

        def total(what: str) -> float:
            name = f"lorary_runtime_time_to_first_token_seconds_{what}"
            return sum(self._registry.get_sample_value(name, {"of": of}) or 0.0 for of in ("base", "adapter"))

        return {"requests": total("count"), "seconds": round(total("sum"), 4)}

    def finished(self, *, endpoint: str, status: int, num_prompt_tokens: int, duration_s: float) -> None:
        outcome = OUTCOMES.get(status, "refused" if status < 500 else "failed")
        self._requests.labels(endpoint, outcome).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._duration.labels(endpoint).observe(duration_s)

    def grant_refused(self, code: str | None) -> None:
        self._grants_refused.labels(code if code in GRANT_CODES else "other").inc()

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"lorary_runtime_{name}", says, labels, registry=self._registry)

    def _histogram(self, name: str, says: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lorary_runtime_{name}", says, labels, buckets=buckets, registry=self._registry)


class _EngineMetrics(Collector):
    """Reads one snapshot a scrape."""

    def __init__(self, state: Callable[[], EngineState], health: Health) -> None:
        self._state = state
        self._health = health

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        yield _gauges(
            "lorary_runtime_ready",
            "1 where this part of `/readyz` is good.",
            "part",
            {k: float(v) for k, v in self._health.checks().items()},
        )
        yield GaugeMetricFamily("lorary_runtime_requests_running", "Requests in the batch.", value=state.num_running)
        yield GaugeMetricFamily("lorary_runtime_requests_waiting", "Requests in the queue.", value=state.num_queued)
        yield _gauges(
            "lorary_runtime_pool_pages", "Pages of the pool by use; what is idle leaves under pressure.", "use", dict(state.pages)
        )
        yield GaugeMetricFamily(
            "lorary_runtime_pool_unused_bytes", "Bytes in pages that are held and hold nothing yet or ever.", value=state.unused_bytes
        )
        yield GaugeMetricFamily("lorary_runtime_page_bytes", "Bytes of a page.", value=state.page_bytes)
        yield _gauges("lorary_runtime_adapters", "Adapters by the tier nearest to the kernels.", "tier", _tiers(state))
        yield GaugeMetricFamily("lorary_runtime_slots", "Adapters that may be in the pool at once.", value=state.num_slots)
        yield from _counts(state.counts)
        yield from _for_vllm_routers(state)


def _gauges(name: str, says: str, label: str, values: dict[str, float]) -> Metric:
    gauge = GaugeMetricFamily(name, says, labels=[label])
    for key, value in values.items():
        gauge.add_metric([key], value)
    return gauge


def _tiers(state: EngineState) -> dict[str, float]:
    return {tier: sum(one.tier == tier for one in state.residents) for tier in ("pool", "host", "disk")}


def _counts(counts: EngineCounts) -> Iterator[Metric]:
    pulls = counts.pulls
    yield CounterMetricFamily("lorary_runtime_generated_tokens", "Tokens that the engine has chosen.", value=counts.num_generated_tokens)
    yield CounterMetricFamily(
        "lorary_runtime_step_tokens", "Tokens computed in steps, prompts and recomputation among them.", value=counts.num_step_tokens
    )
    yield _batch_sizes(counts)
    yield CounterMetricFamily(
        "lorary_runtime_preemptions", "Requests that were sent back to the queue for want of pages.", value=counts.num_preemptions
    )
    yield CounterMetricFamily("lorary_runtime_adapter_loads", "Copies of an adapter from the host into the pool.", value=counts.num_loads)
    yield CounterMetricFamily("lorary_runtime_adapter_load_seconds", "Time spent on them.", value=counts.load_s)
    yield CounterMetricFamily("lorary_runtime_adapter_evictions", "Adapters that left the pool under pressure.", value=counts.num_evictions)
    yield from _pool_counts(counts)
    done = CounterMetricFamily(
        "lorary_runtime_adapter_pulls", "Pulls of an adapter to the host, by where it came from, or failed.", labels=["result"]
    )
    for result, value in (("registry", pulls.num_pulled), ("disk", pulls.num_from_disk), ("failed", pulls.num_failed)):
        done.add_metric([result], value)
    yield done
    yield CounterMetricFamily("lorary_runtime_adapter_pull_bytes", "Bytes pulled from the registry.", value=pulls.num_bytes)
    yield CounterMetricFamily("lorary_runtime_adapter_pull_seconds", "Time spent on pulls from the registry.", value=pulls.seconds)


def _pool_counts(counts: EngineCounts) -> Iterator[Metric]:
    queried, hit = counts.num_prefix_queried_tokens, counts.num_prefix_hit_tokens
    yield CounterMetricFamily(
        "lorary_runtime_prefix_queried_tokens", "Tokens of requests that were looked up among prefixes.", value=queried
    )
    yield CounterMetricFamily("lorary_runtime_prefix_hit_tokens", "Tokens of these whose K and V lay in the pool.", value=hit)
    yield CounterMetricFamily(
        "lorary_runtime_prefix_evictions", "Prefix pages that left the pool under pressure.", value=counts.num_prefix_evictions
    )
    yield CounterMetricFamily(
        "lorary_runtime_merges", "Copies of the weights with an adapter's delta that were written.", value=counts.num_merges
    )
    yield CounterMetricFamily("lorary_runtime_merge_seconds", "Time spent on them.", value=counts.merge_s)
    yield CounterMetricFamily(
        "lorary_runtime_moved_pages", "Pages that were copied out of the way of a merge.", value=counts.num_moved_pages
    )


def _batch_sizes(counts: EngineCounts) -> Metric:
    """Steps by the number of requests in them."""
    sizes = counts.batch_sizes
    bounds = [(str(float(size)), float(sum(num for had, num in sizes.items() if had <= size))) for size in BATCH_SIZES]
    buckets = [*bounds, ("+Inf", float(sum(sizes.values())))]
    total = float(sum(had * num for had, num in sizes.items()))
    return HistogramMetricFamily("lorary_runtime_batch_requests", "Requests in a step.", buckets=buckets, sum_value=total)


# ---- names of vLLM, for routers that read them ----


def _for_vllm_routers(state: EngineState) -> Iterator[Metric]:
    """Activity as vLLM has it today, residency as vllm-project/vllm#54830 proposes it. An adapter's name is its identity here."""
    yield GaugeMetricFamily("vllm:num_requests_running", "Requests in the batch.", value=state.num_running)
    yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests in the queue.", value=state.num_queued)
    used = 1.0 - (state.num_free_pages + state.num_idle_pages) / state.num_pages
    yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the pool in use, 0 to 1.", value=used)
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters of the requests in hand.",
        labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
    )
    info.add_metric([str(state.num_slots), _listed(state.waiting_adapters), _listed(state.running_adapters)], time.time())
    yield info
    yield from _residency(state)


def _residency(state: EngineState) -> Iterator[Metric]:
    pool = [one for one in state.residents if one.tier == "pool"]
    host = [one for one in state.residents if one.tier == "host"]
    loaded = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "1 for an adapter in the pool (gpu) or on the host (cpu).",
        labels=["adapter_name", "level", "pinned", "rank"],
    )
    for one in pool:
        loaded.add_metric([_name(one.key), "gpu", _pinned(one, state), str(one.rank)], 1)
    for one in host[-state.num_slots :]:  # those used last
        loaded.add_metric([_name(one.key), "cpu", "false", ""], 1)
    yield loaded
    yield GaugeMetricFamily("vllm:num_gpu_loaded_lora_adapters", "Adapters in the pool.", value=len(pool))
    yield GaugeMetricFamily("vllm:num_cpu_loaded_lora_adapters", "Adapters on the host, not in the pool.", value=len(host))
    yield GaugeMetricFamily("vllm:max_gpu_lora_adapters", "Adapters that may be in the pool at once.", value=state.num_slots)


def _pinned(one: ResidentAdapter, state: EngineState) -> str:
    """In use: nothing evicts it."""
    return str(one.key in state.running_adapters).lower()


def _listed(keys: frozenset[AdapterKey]) -> str:
    return ",".join(sorted(map(_name, keys)))


def _name(key: AdapterKey) -> str:
    return f"{key.tenant}/{key.form_digest}"
