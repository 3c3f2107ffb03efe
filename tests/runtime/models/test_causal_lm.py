"""Logits of every architecture against transformers, with chunked prefill, decode, a shuffled paged KV and mixed batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_runtime.core import NO_SLOT, TARGETS
from gpu_runtime.kernels.backend import AdapterTables, Decoder, DecoderSpec, Kernels, LayerWeights, select_backend
from gpu_runtime.kernels.batch import BatchRow, build_batch
from gpu_runtime.kernels.cpu.kernels import CpuKernels
from gpu_runtime.kernels.decoder import OpByOpDecoder
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.plan import Site, plan_adapter
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.models.causal_lm import CausalLM
from gpu_runtime.models.spec import ModelSpec
from gpu_runtime.models.weights import load_weights
from tests.runtime.conftest import kernels_named
from tests.tiny import make_tiny_model

GEMMA3: dict[str, Any] = {
    "family": "gemma3_text",
    "head_dim": 32,
    "num_layers": 4,
    "sliding_window": 20,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied-gqa-wide-head": {"tied": False, "num_heads": 6, "num_kv_heads": 1, "head_dim": 24, "hidden_size": 96},
    "mha": {"num_heads": 4, "num_kv_heads": 4, "num_layers": 3},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-biased": {"attention_bias": True},
    "mistral": {"family": "mistral", "sliding_window": None},
    "mistral-window": {"family": "mistral", "sliding_window": 24, "num_heads": 6, "hidden_size": 96},
    "qwen2": {"family": "qwen2"},
    "qwen2-window": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"family": "qwen3", "head_dim": 24, "tied": False},
    "qwen3-biased": {"family": "qwen3", "head_dim": 32, "attention_bias": True},
    "gemma3": GEMMA3,
}


class Runner:
    """The runtime's model with a small poisoned pool, stepped by hand."""

    def __init__(self, model_dir: Path, *, kernels: Kernels, num_pages: int = 64, num_slots: int = 1) -> None:
        spec = ModelSpec.from_config(json.loads((model_dir / "config.json").read_text()))
        self.layout = PageLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim)
        self.pool = PagePool(num_pages=num_pages, page_bytes=self.layout.page_bytes, poison_freed=True)
        self.tables = SlotTables(num_slots=num_slots, num_layers=spec.num_layers, max_rank=8)
        weights = load_weights(model_dir, spec=spec)
        self.model = CausalLM(spec, weights=weights, kernels=kernels, pool=self.pool, layout=self.layout, tables=self.tables)

    def pages(self, num_tokens: int) -> list[int]:
        """Pages in descending order, so that a table that is read as a range fails."""
        return sorted(self.pool.allocate(self.layout.pages_for(num_tokens), owner="test"), reverse=True)

    def install_random_adapter(self, slot: int, *, rank: int) -> None:
        """On every linear; the same slot and rank give the same weights."""
        spec = self.model.spec
        sites = [Site(layer, target, rank, *spec.target_shape(target)) for layer in range(spec.num_layers) for target in TARGETS]
        plan = plan_adapter(self.layout, sites, 2)
        pages = self.pool.allocate(plan.num_pages, owner=f"adapter {slot}")
        generator = torch.Generator().manual_seed(slot)
        for page in pages:
            noise = 0.1 * torch.randn(self.layout.page_bytes // 2, generator=generator)
            self.pool.data[page] = noise.bfloat16().view(torch.uint8)
        self.tables.install(slot, plan, pages, [1.0] * len(sites), torch.bfloat16)

    def step(self, *rows: BatchRow) -> torch.Tensor:
        return self.model.forward(build_batch(rows, tokens_per_page=self.layout.tokens_per_page))


def transformers_logits(model_dir: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


def random_prompts(vocab_size: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def chunked_logits(runner: Runner, prompts: list[list[int]], *, chunk: int) -> list[dict[int, torch.Tensor]]:
    """Feed all prompts side by side, `chunk` tokens a step and the last 3 tokens one by one: {position: logits} of each."""
    tables = [runner.pages(len(prompt)) for prompt in prompts]
    done = [0] * len(prompts)
    seen: list[dict[int, torch.Tensor]] = [{} for _ in prompts]
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        rows, owners = [], []
        for index, prompt in enumerate(prompts):
            left = len(prompt) - done[index]
            size = min(chunk, left - 3) if left > 3 else 1
            if left > 0:
                rows.append(BatchRow(prompt[done[index] : done[index] + size], done[index], tables[index], NO_SLOT))
                owners.append(index)
                done[index] += size
        for index, logits in zip(owners, runner.step(*rows), strict=True):
            seen[index][done[index] - 1] = logits
    return seen


def worst_difference(model_dir: Path, runner: Runner, prompts: list[list[int]], *, chunk: int) -> float:
    expected = transformers_logits(model_dir, prompts)
    seen = chunked_logits(runner, prompts, chunk=chunk)
    assert all(len(found) >= 3 for found in seen)
    return max(float((expected[index][at] - row).abs().max()) for index, found in enumerate(seen) for at, row in found.items())


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return select_backend(reference=request.param == "reference")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk", [5, 64])
def test_logits_equal_transformers(tmp_path: Path, kernels: Kernels, kind: str, chunk: int) -> None:
    model_dir = make_tiny_model(tmp_path, vector_noise=0.3, **MODELS[kind])
    runner = Runner(model_dir, kernels=kernels)
    prompts = random_prompts(runner.model.spec.vocab_size, [1 + 3, 17, 33, 100])
    assert worst_difference(model_dir, runner, prompts, chunk=chunk) < 1e-4


@pytest.mark.model
def test_real_model_logits_equal_transformers(kernels: Kernels, base_model_dir: Path) -> None:
    runner = Runner(base_model_dir, kernels=kernels)
    prompts = random_prompts(runner.model.spec.vocab_size, [8, 23, 50])
    assert worst_difference(base_model_dir, runner, prompts, chunk=16) < 1e-3


class OpByOp(CpuKernels):
    """The CPU's ops composed in Python: the compiled decoder must do the same, bit for bit."""

    def decoder(
        self, spec: DecoderSpec, *, layers: Sequence[LayerWeights], kv: torch.Tensor, pool: torch.Tensor, tables: AdapterTables
    ) -> Decoder:
        return OpByOpDecoder(self, spec=spec, layers=layers, kv=kv, pool=pool, tables=tables)


@pytest.mark.parametrize("kind", ["mistral-window", "qwen2", "gemma3"])
def test_the_compiled_decoder_is_its_ops_in_order(tmp_path: Path, kind: str) -> None:
    model_dir = make_tiny_model(tmp_path, vector_noise=0.3, **MODELS[kind])
    compiled, composed = (Runner(model_dir, kernels=kernels, num_slots=2) for kernels in (CpuKernels(threads=3), OpByOp(threads=1)))
    prompts = random_prompts(compiled.model.spec.vocab_size, [30, 9, 17, 4])
    seen = []
    for runner in (compiled, composed):
        for slot in (0, 1):
            runner.install_random_adapter(slot, rank=3 + 5 * slot)
        pages = [runner.pages(len(prompt) + 1) for prompt in prompts]
        rows = [BatchRow(prompt, 0, held, slot) for prompt, held, slot in zip(prompts, pages, [0, NO_SLOT, 1, 1], strict=True)]
        first = runner.step(*rows)
        nexts = [BatchRow([5], len(row.token_ids), row.pages, row.slot) for row in rows]
        seen.append((first, runner.step(*nexts), runner.step(*nexts[::-1]).flip(0)))
    for one, other in zip(*seen, strict=True):
        assert one.equal(other)
    assert seen[0][1].equal(seen[0][2]), "the order of a batch must not matter"
    assert seen[0][0].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["llama-biased", "gemma3"])
def test_the_gpus_kernels_compute_the_same_model(tmp_path: Path, kind: str) -> None:
    """Under the interpreter: prompts, decode rows, two adapters and base rows in one batch, beside the reference."""
    shape = {"num_layers": 2, "sliding_window_pattern": 2} if kind == "gemma3" else {"num_heads": 6, "head_dim": 24, "hidden_size": 96}
    model_dir = make_tiny_model(tmp_path, vector_noise=0.3, **{**MODELS[kind], **shape})
    seen = []
    for name in ("gpu", "reference"):
        runner = Runner(model_dir, kernels=kernels_named(name), num_slots=2)
        for slot in (0, 1):
            runner.install_random_adapter(slot, rank=3 + 5 * slot)
        prompts = random_prompts(runner.model.spec.vocab_size, [34, 9, 4])
        pages = [runner.pages(len(prompt) + 1) for prompt in prompts]
        rows = [BatchRow(prompt, 0, held, slot) for prompt, held, slot in zip(prompts, pages, [0, NO_SLOT, 1], strict=True)]
        seen.append((runner.step(*rows), runner.step(*(BatchRow([5], len(row.token_ids), row.pages, row.slot) for row in rows))))
    for one, other in zip(*seen, strict=True):
        assert float((one - other).abs().max()) < 1e-4
