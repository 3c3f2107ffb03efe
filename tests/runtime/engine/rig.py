"""What the engine's tests share: tiny adapters on disk, an engine around a tiny model, and PEFT as the oracle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file

from gpu_runtime.adapters.flights import Executor
from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.config import RuntimeConfig
from gpu_runtime.core import TARGETS, AdapterKey, Request, SamplingParams, StepOutput
from gpu_runtime.engine.build import build_engine, page_layout
from gpu_runtime.engine.engine import Engine
from gpu_runtime.kernels.sample import Sampled, SampleRow, sample
from gpu_runtime.models.spec import ModelSpec
from registry.artifact.base import PARENTS, BaseSpec

BASE_DIGEST = "b" * 64
T = TypeVar("T")
TIE = 1e-4  # where the top two logits differ by less, either token is right, and comparison ends there


def write_adapter(
    folder: Path,
    model_dir: Path,
    *,
    rank: int,
    targets: Sequence[str] = TARGETS,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    strength: float = 1.0,
    fill: float | None = None,
) -> Path:
    """A LoRA adapter whose delta is about `strength` times as large as a weight of the tiny model; `fill` replaces every value."""
    base = BaseSpec.from_config(json.loads((model_dir / "config.json").read_text()))
    random = np.random.default_rng(seed)
    chosen = range(base.num_layers) if layers is None else layers
    tensors = {}
    for layer in chosen:
        for target in targets:
            num_in, num_out = base.targets[target]
            stem = f"base_model.model.model.layers.{layer}.{PARENTS[target]}.{target}"
            a = random.normal(0, 1, (rank, num_in)) / np.sqrt(num_in)
            b = random.normal(0, 1, (num_out, rank)) * strength / np.sqrt(rank)
            for name, values in (("A", a), ("B", b)):
                data = torch.from_numpy(values if fill is None else np.full_like(values, fill))
                tensors[f"{stem}.lora_{name}.weight"] = data.to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    config |= {"base_model_name_or_path": "tiny"}
    if layers is not None:
        config |= {"layers_to_transform": list(layers)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class LogitRecorder:
    """A sampler that keeps every row of logits it sees, by (seed, position)."""

    seen: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def __call__(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        for row, values in zip(rows, logits, strict=True):
            self.seen[row.seed, row.position] = values.clone()
        return sample(logits, rows)


def _settle(job: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(job())
    except Exception as error:  # noqa: BLE001 - as every executor does
        future.set_exception(error)


class InlineExecutor:
    """Runs a pull the moment it is begun: every adapter is here before the next step."""

    def submit(self, job: Callable[[], T], /) -> Future[T]:
        future: Future[T] = Future()
        _settle(job, future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


class HeldExecutor(InlineExecutor):
    """Keeps pulls until the test lets them go."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], T], /) -> Future[T]:
        future: Future[T] = Future()
        self.jobs.append(lambda: _settle(job, future))
        return future

    def release(self, count: int | None = None) -> None:
        jobs, self.jobs = self.jobs[:count], self.jobs[len(self.jobs) if count is None else count :]
        for job in jobs:
            job()


@dataclass
class Rig:
    """An engine without a thread, its source and its recorded logits."""

    engine: Engine
    source: LocalSource
    recorder: LogitRecorder
    outputs: dict[str, list[StepOutput]] = field(default_factory=dict)
    checks_steps: bool = True  # a large poisoned pool takes longer to check than to use: then only at the end

    @classmethod
    def build(cls, model_dir: Path, *, pool_pages: int = 64, executor: Executor | None = None, **settings: Any) -> Rig:
        source = LocalSource(base_digest=BASE_DIGEST)
        recorder = LogitRecorder()
        defaults = {"poison_freed": True, "max_batch_requests": 8, "max_step_tokens": 64, "num_slots": 8, "threads": 1}
        config = RuntimeConfig(model_dir, **{**defaults, "pool_bytes": pool_pages * page_bytes(model_dir), **settings})
        num_threads = torch.get_num_threads()
        engine = build_engine(config, source, base_digest=BASE_DIGEST, sampler=recorder, executor=executor)
        torch.set_num_threads(num_threads)  # the oracle shares the process
        return cls(engine, source, recorder)

    def add(
        self, request_id: str, prompt: Sequence[int], *, adapter: AdapterKey | None = None, deadline_s: float | None = None, **params: Any
    ) -> Request:
        """Queue a request; `seed` of the params is what the recorder knows it by."""
        settings = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params})
        request = Request(request_id, tuple(prompt), settings, adapter, arrived_s=time.monotonic(), deadline_s=deadline_s)
        self.engine.add_request(request)
        return request

    def step(self) -> list[StepOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        if self.checks_steps:
            self.engine.check_integrity()
        return outputs

    def run(self, *, until: Callable[[], bool] | None = None, limit_s: float = 60.0) -> None:
        """Step until everything has ended, or `until` holds."""
        deadline = time.monotonic() + limit_s
        while self.engine.has_work and not (until and until()):
            if not self.step() and not self.engine.can_progress:
                time.sleep(0.001)  # every request waits for a pull
            assert time.monotonic() < deadline, f"still at work after {limit_s} s: {self.engine.state()}"

    def tokens(self, request_id: str) -> list[int]:
        return [output.token_id for output in self.outputs[request_id] if output.token_id is not None]

    def close(self) -> None:
        self.engine.close()
        self.engine.check_integrity()


def page_bytes(model_dir: Path) -> int:
    """Of the layout that the engine will choose for this model in float32."""
    return page_layout(ModelSpec.from_config(json.loads((model_dir / "config.json").read_text())), dtype=torch.float32).page_bytes


class PeftOracle:
    """transformers + PEFT in fp32, one prompt at a time."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._peft: Any = None
        self._names: dict[Path, str] = {}

    def logits(self, tokens: Sequence[int], *, adapter: Path | None) -> torch.Tensor:
        """Logits f32 (len(tokens), vocab) of the whole sequence."""
        with torch.inference_mode():
            return self._model(adapter)(torch.tensor([list(tokens)])).logits[0]

    def _model(self, adapter: Path | None) -> Any:
        from peft import PeftModel

        if adapter is None:
            return self._base if self._peft is None else self._disabled
        if self._peft is None:
            self._names[adapter] = "a0"
            self._peft = PeftModel.from_pretrained(self._base, adapter, adapter_name="a0").eval()
        elif adapter not in self._names:
            self._names[adapter] = f"a{len(self._names)}"
            self._peft.load_adapter(adapter, adapter_name=self._names[adapter])
        self._peft.set_adapter(self._names[adapter])
        return self._peft

    def _disabled(self, tokens: torch.Tensor) -> Any:
        with self._peft.disable_adapter():
            return self._peft(tokens)


def require_parity(oracle: PeftOracle, prompt: Sequence[int], tokens: Sequence[int], *, adapter: Path | None) -> torch.Tensor:
    """Every token is the oracle's greedy choice after the ones before it, up to the first tie. The oracle's logits for each token.

    One pass over prompt and answer gives all of them: greedy decoding is equal to it exactly while no token differs.
    """
    logits = oracle.logits([*prompt, *tokens], adapter=adapter)[len(prompt) - 1 : -1]
    for position, token in enumerate(tokens):
        best = logits[position].topk(2)
        if float(best.values[0] - best.values[1]) < TIE:
            return logits[:position]
        assert token == int(best.indices[0]), f"token {position} is {token}, the oracle says {best.indices.tolist()} {best.values.tolist()}"
    return logits
