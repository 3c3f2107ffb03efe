"""`python -m tests.bench.unified`: one pool for adapters and KV against the best of three fixed splits of the same bytes.

The demand swings: many adapters with short prompts, then few adapters with long ones, and again. The real scheduler, pool
and residency run under a virtual clock; a step costs STEP_MS, plus TOKEN_MS a token, plus PAGE_MS for every page of an adapter
loaded before it: a decode that is bound by reading the base weights, as on a GPU (15 ms is what dLoRA publishes for its
Llama-7B), so that a larger batch is nearly free and whoever packs more requests into the bytes wins. Work is queued at once, in
order, so every side is saturated. The floor of a split is nothing; that of the unified pool is the batch limit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpu_runtime.adapters.host import HostCache
from gpu_runtime.adapters.image import AdapterImage
from gpu_runtime.adapters.merging import Merging
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.core import AdapterKey, Request, SamplingParams
from gpu_runtime.engine.engine import Engine
from gpu_runtime.engine.runner import Runner
from gpu_runtime.kernels.backend import BaseMatrix, PackedWeight
from gpu_runtime.kernels.batch import ForwardBatch
from gpu_runtime.kernels.reference import ReferenceKernels
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.plan import Site, plan_adapter
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.scheduling.admission import Limits
from gpu_runtime.scheduling.planner import Planner, Rules
from gpu_runtime.scheduling.scheduler import Scheduler
from tests.bench.rows import Row, finish
from tests.bench.split_memory import SplitResidency
from tests.runtime.engine.rig import InlineExecutor

BAR = 1.3
STEP_MS, TOKEN_MS, PAGE_MS = 15.0, 0.02, 0.08  # 2 MiB over 25 GB/s
NUM_PAGES, BATCH, SPLITS = 480, 32, (0.25, 0.5, 0.75)
LAYOUT = PageLayout(num_layers=1, num_kv_heads=1, head_dim=4)  # 16 tokens in 512 bytes: bytes stand for nothing here, pages do
RANK, WIDTH = 24, 32  # 12 pages an adapter
VOCAB = 8


@dataclass(frozen=True)
class Phase:
    """`num_requests` over `num_adapters`, uniform; prompt and output lengths uniform over closed ranges."""

    num_requests: int
    num_adapters: int
    prompt: tuple[int, int]
    output: tuple[int, int]


MANY = Phase(240, 96, (8, 32), (8, 32))
FEW = Phase(60, 4, (256, 512), (64, 192))
SWINGS = 3


def requests(swings: int) -> Iterator[Request]:
    rng = random.Random(7)
    for at in range(swings):
        for name, phase in (("many", MANY), ("few", FEW)):
            for number in range(phase.num_requests):
                prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(*phase.prompt)))
                params = SamplingParams(max_tokens=rng.randint(*phase.output), temperature=0.0, ignore_eos=True)
                key = AdapterKey("t", f"{name}-{rng.randrange(phase.num_adapters)}")
                yield Request(f"{at}-{name}-{number}", prompt, params, key, arrived_s=0.0)


class Images:
    """A puller whose adapters are all of one size."""

    def __init__(self) -> None:
        plan = plan_adapter(LAYOUT, [Site(0, "q_proj", RANK, WIDTH, WIDTH)], 4)
        self.image = AdapterImage(plan, torch.zeros((plan.num_pages, plan.page_bytes), dtype=torch.uint8), (1.0,), torch.float32)

    def pull(self, _key: AdapterKey, *, grant: str | None) -> AdapterImage:
        return self.image


class NoDecoder:
    """Nothing to merge into."""

    matrices: tuple[BaseMatrix, ...] = ()

    def point(self, index: int, weight: PackedWeight) -> None:
        raise AssertionError("there is no matrix")

    def __call__(self, x: torch.Tensor, *, batch: ForwardBatch) -> torch.Tensor:
        raise AssertionError("nothing is computed here")


class Timed:
    """A model that takes its time on a clock of its own and says always the same."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def hidden(self, batch: ForwardBatch) -> torch.Tensor:
        self.now_s += 1e-3 * (STEP_MS + TOKEN_MS * batch.num_tokens)
        return torch.zeros(batch.num_tokens, VOCAB)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@dataclass(frozen=True)
class Served:
    tokens_per_s: float
    num_loads: int
    num_preemptions: int


def serve(*, adapter_share: float | None, swings: int) -> Served:
    """All requests on one side; `adapter_share` None is the unified pool."""
    pool, images, model = PagePool(num_pages=NUM_PAGES, page_bytes=LAYOUT.page_bytes), Images(), Timed()
    tables = SlotTables(num_slots=128, num_layers=1, max_rank=RANK)
    parts = {"tables": tables, "puller": images, "host": HostCache(max_bytes=1 << 30), "executor": InlineExecutor(), "num_pull_threads": 4}
    residency = (
        Residency(pool=pool, **parts)  # type: ignore[arg-type] # a puller that makes its images
        if adapter_share is None
        else SplitResidency(adapter_pages=int(adapter_share * NUM_PAGES), pool=pool, **parts)
    )
    merging = Merging(pool=pool, tables=tables, residency=residency, decoder=NoDecoder(), kernels=ReferenceKernels(), max_share=0.0)
    limits = Limits(NUM_PAGES, BATCH, max_step_tokens=512, max_model_len=1024, max_waiting=10**6)
    planner = Planner(Rules(), num_places=BATCH, max_step_tokens=limits.max_step_tokens, merger=merging)
    engine = Engine(
        scheduler=Scheduler(limits=limits, layout=LAYOUT, pool=pool, residency=residency, planner=planner),
        runner=Runner(model, tokens_per_page=LAYOUT.tokens_per_page),
        residency=residency,
        pool=pool,
        merging=merging,
        max_rank=RANK,
        num_slots=128,
        vocab_size=VOCAB,
        eos_token_ids=frozenset(),
        clock=lambda: model.now_s,
    )
    for request in requests(swings):
        engine.add_request(request)
    num_tokens = loaded = 0
    while engine.has_work:
        num_tokens += len(engine.step())
        model.now_s += 1e-3 * PAGE_MS * images.image.num_pages * (residency.num_loads - loaded)
        loaded = residency.num_loads
    engine.check_integrity()
    return Served(num_tokens / model.now_s, residency.num_loads, engine.scheduler.num_preemptions)


def describe() -> str:
    return (
        f"{NUM_PAGES} pages of {LAYOUT.tokens_per_page} tokens, {Images().image.num_pages} an adapter, batch {BATCH}, {SWINGS} swings of "
        f"{MANY} then {FEW}; a step costs {STEP_MS} ms + {TOKEN_MS} a token + {PAGE_MS} a page loaded"
    )


def rows(*, short: bool) -> list[Row]:
    print(describe(), flush=True)
    swings = 1 if short else SWINGS
    unified = serve(adapter_share=None, swings=swings)
    splits = {share: serve(adapter_share=share, swings=swings) for share in SPLITS}
    best = max(splits, key=lambda share: splits[share].tokens_per_s)
    sides = ", ".join(f"{share:.0%} {side.tokens_per_s:.0f}" for share, side in splits.items())
    detail = f"unified {unified.tokens_per_s:.0f} tok/s on a virtual clock, splits {sides}"
    ratio = unified.tokens_per_s / splits[best].tokens_per_s
    return [Row("unified pool / best split of 25, 50, 75 %", ratio, BAR, "python -m tests.bench.unified", detail=detail)]


if __name__ == "__main__":
    finish(rows(short=False))
