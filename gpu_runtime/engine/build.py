"""Wires an engine from a configuration and a source of adapters: the only place that knows all of its parts."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gpu_runtime.adapters.disk import DiskCache
from gpu_runtime.adapters.flights import Executor
from gpu_runtime.adapters.host import HostCache
from gpu_runtime.adapters.image import ImageBuilder
from gpu_runtime.adapters.merging import Merging
from gpu_runtime.adapters.pull import Puller
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.adapters.source import AdapterSource
from gpu_runtime.config import MIB, RuntimeConfig
from gpu_runtime.engine.engine import Engine
from gpu_runtime.engine.runner import Runner, Sampler
from gpu_runtime.kernels.backend import Kernels, select_backend
from gpu_runtime.kernels.sample import sample
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.models.causal_lm import CausalLM
from gpu_runtime.models.spec import ModelSpec
from gpu_runtime.models.weights import load_weights
from gpu_runtime.scheduling.admission import Limits
from gpu_runtime.scheduling.planner import Planner, Rules
from gpu_runtime.scheduling.prefixes import Prefixes
from gpu_runtime.scheduling.scheduler import Scheduler
from registry.artifact.base import BaseSpec

WIDEST_STORED_BYTES = 4  # adapters are stored in f32 at most


def build_engine(
    config: RuntimeConfig,
    source: AdapterSource,
    *,
    base_digest: str | None = None,
    executor: Executor | None = None,
    sampler: Sampler = sample,
) -> Engine:
    """Load the base model of `config.model_dir` and make an engine around it. On a CPU torch itself keeps one thread from then on.

    `base_digest`: refuse forms made for any other base model; None takes every form that fits by shape. `executor` runs
    the pulls (default: a pool of threads). Raises ValueError for a model that this runtime cannot serve, or a pool too small.
    """
    if config.device == "cpu":
        torch.set_num_threads(1)  # of this process: the kernels have a team of their own, and two pools that spin fight for the cores
    raw = json.loads((config.model_dir / "config.json").read_bytes())
    spec = ModelSpec.from_config(raw)
    _require_dtype(config, spec)
    layout = page_layout(spec, dtype=_kv_dtype(config))
    pool = _pool(config, layout)
    tables = SlotTables(num_slots=config.num_slots, num_layers=spec.num_layers, max_rank=config.max_rank, device=config.device)
    builder = ImageBuilder(
        layout=layout,
        base=BaseSpec.from_config(raw),
        max_rank=config.max_rank,
        base_digest=base_digest,
        poison_gaps=config.poison_freed,
    )
    residency = _residency(config, source, builder=builder, pool=pool, tables=tables, executor=executor)
    max_model_len = min(config.max_model_len or spec.max_positions, spec.max_positions)
    kernels = select_backend(config.device, threads=config.threads or None)
    model = _model(config, spec, kernels=kernels, pool=pool, layout=layout, tables=tables, max_positions=max_model_len)
    merging = Merging(pool=pool, tables=tables, residency=residency, decoder=model.decoder, kernels=kernels, max_share=config.merge_share)
    eos_token_ids = frozenset(spec.eos_token_ids) | _generation_eos(config.model_dir)
    limits = Limits(pool.num_pages, config.max_batch_requests, config.max_step_tokens, max_model_len, config.max_waiting)
    return Engine(
        scheduler=Scheduler(
            limits=limits,
            layout=layout,
            pool=pool,
            residency=residency,
            planner=_planner(config, merging),
            prefixes=Prefixes(pool, tokens_per_page=layout.tokens_per_page, enabled=config.prefix_caching),
        ),
        runner=Runner(
            model,
            tokens_per_page=layout.tokens_per_page,
            device=config.device,
            sampler=sampler,
            eos_token_ids=eos_token_ids,
        ),
        residency=residency,
        pool=pool,
        merging=merging,
        max_rank=config.max_rank,
        num_slots=config.num_slots,
        vocab_size=spec.vocab_size,
        eos_token_ids=eos_token_ids,
    )


def _kv_dtype(config: RuntimeConfig) -> torch.dtype:
    """A CPU computes in float32 whatever the weights were rounded to, and keeps K and V so."""
    return torch.float32 if config.device == "cpu" else getattr(torch, config.dtype)


def _require_dtype(config: RuntimeConfig, spec: ModelSpec) -> None:
    if config.dtype == "float16" and config.device != "cpu" and spec.architecture.outgrows_float16:
        model = spec.architecture.model_type
        raise ValueError(f"dtype is 'float16'; activations of {model} are larger than that holds: choose bfloat16 or float32")


def _planner(config: RuntimeConfig, merging: Merging) -> Planner:
    rules = Rules(config.policy, float(config.max_wait_s), config.max_batch_adapters)
    return Planner(rules, num_places=config.max_batch_requests, max_step_tokens=config.max_step_tokens, merger=merging)


def page_layout(spec: ModelSpec, *, dtype: torch.dtype) -> PageLayout:
    """The layout of the pool for a base model with KV in `dtype`: a page holds the widest rank row in any stored dtype."""
    return PageLayout.fitting(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        kv_dtype=dtype,
        widest_row_bytes=spec.widest_target * WIDEST_STORED_BYTES,
    )


def _pool(config: RuntimeConfig, layout: PageLayout) -> PagePool:
    pool_bytes = config.pool_bytes or _default_pool_bytes()
    if pool_bytes < layout.page_bytes:
        raise ValueError(f"pool_bytes is {pool_bytes}; one page of this base model has {layout.page_bytes} bytes: give the pool more")
    num_pages = pool_bytes // layout.page_bytes
    return PagePool(num_pages=num_pages, page_bytes=layout.page_bytes, device=config.device, poison_freed=config.poison_freed)


def _default_pool_bytes() -> int:
    """An eighth of the machine's memory, at least 64 MiB and at most 4 GiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(memory // 8, 64 * MIB), 4096 * MIB)


def _model(
    config: RuntimeConfig, spec: ModelSpec, *, kernels: Kernels, pool: PagePool, layout: PageLayout, tables: SlotTables, max_positions: int
) -> CausalLM:
    weights = load_weights(config.model_dir, spec=spec, dtype=getattr(torch, config.dtype), device=config.device)
    return CausalLM(spec, weights=weights, kernels=kernels, pool=pool, layout=layout, tables=tables, max_positions=max_positions)


def _residency(
    config: RuntimeConfig,
    source: AdapterSource,
    *,
    builder: ImageBuilder,
    pool: PagePool,
    tables: SlotTables,
    executor: Executor | None,
) -> Residency:
    disk = None if config.disk_cache_dir is None else DiskCache(config.disk_cache_dir, max_bytes=config.disk_cache_bytes)
    return Residency(
        pool=pool,
        tables=tables,
        puller=Puller(source, builder=builder, disk=disk, max_form_bytes=pool.num_pages * pool.page_bytes),
        host=HostCache(max_bytes=config.host_cache_bytes),
        executor=executor or ThreadPoolExecutor(config.num_pull_threads, thread_name_prefix="pull"),
        num_pull_threads=config.num_pull_threads,
    )


def _generation_eos(model_dir: Path) -> frozenset[int]:
    """End-of-sequence tokens of generation_config.json: chat models often name more of them there."""
    path = model_dir / "generation_config.json"
    value: Any = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    return frozenset(value if isinstance(value, list) else [] if value is None else [value])
