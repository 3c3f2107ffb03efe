"""Random arrivals, pulls, failures, cancels and drops on a tiny pool: integrity after every operation, nothing left at the end."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from gpu_runtime.adapters.host import HostCache
from gpu_runtime.adapters.merging import Merging
from gpu_runtime.adapters.residency import Residency
from gpu_runtime.core import AdapterKey, FinishReason, Request, RequestState, SamplingParams, StepOutput
from gpu_runtime.engine.engine import Engine
from gpu_runtime.engine.runner import Runner
from gpu_runtime.kernels.reference import ReferenceKernels
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.scheduling.admission import Limits
from gpu_runtime.scheduling.planner import Planner, Rules
from gpu_runtime.scheduling.prefixes import Prefixes
from gpu_runtime.scheduling.scheduler import Schedule, Scheduler
from tests.runtime.engine.ledger import LAYOUT, VOCAB, LedgerDecoder, LedgerModel, LedgerPuller, expected_tokens, weight_and_rank
from tests.runtime.engine.rig import HeldExecutor

KEYS = [
    AdapterKey(tenant, f"{weight}/{rank}") for tenant, weight, rank in (("a", 1, 1), ("a", 2, 3), ("b", 3, 6), ("b", 4, 8), ("c", 5, 11))
]


class ServingMachine(RuleBasedStateMachine):
    """The whole engine but the arithmetic: see ledger.py for what stands in for the model."""

    requests = Bundle("requests")

    @initialize(
        num_pages=st.integers(6, 20),
        num_slots=st.integers(1, 3),
        num_batch=st.integers(1, 4),
        step_tokens=st.integers(4, 20),
        host_images=st.integers(0, 4),
        num_threads=st.integers(1, 3),
        shares_prefixes=st.booleans(),
    )
    def build(
        self,
        *,
        num_pages: int,
        num_slots: int,
        num_batch: int,
        step_tokens: int,
        host_images: int,
        num_threads: int,
        shares_prefixes: bool,
    ) -> None:
        self.pool = PagePool(num_pages=num_pages, page_bytes=LAYOUT.page_bytes, poison_freed=True)
        tables = SlotTables(num_slots=num_slots, num_layers=1, max_rank=11)
        self.puller = LedgerPuller()
        self.executor = HeldExecutor()
        self.residency = Residency(
            pool=self.pool,
            tables=tables,
            puller=self.puller,  # type: ignore[arg-type] # made images in place of pulled ones
            host=HostCache(max_bytes=host_images * 4 * LAYOUT.page_bytes),
            executor=self.executor,
            num_pull_threads=num_threads,
        )
        decoder = LedgerDecoder(KEYS)
        self.merging = Merging(
            pool=self.pool, tables=tables, residency=self.residency, decoder=decoder, kernels=ReferenceKernels(), max_share=0.5
        )
        limits = Limits(num_pages, num_batch, step_tokens, max_model_len=60, max_waiting=100)
        prefixes = Prefixes(self.pool, tokens_per_page=LAYOUT.tokens_per_page, enabled=shares_prefixes)
        planner = Planner(Rules(), num_places=num_batch, max_step_tokens=step_tokens, merger=self.merging)
        self.engine = Engine(
            scheduler=Scheduler(limits=limits, layout=LAYOUT, pool=self.pool, residency=self.residency, planner=planner, prefixes=prefixes),
            runner=Runner(LedgerModel(self.pool, tables, decoder), tokens_per_page=LAYOUT.tokens_per_page),
            residency=self.residency,
            pool=self.pool,
            merging=self.merging,
            max_rank=11,
            num_slots=num_slots,
            vocab_size=VOCAB,
            eos_token_ids=frozenset(),
            clock=lambda: 0.0,
        )
        self.plan, self.engine.scheduler.schedule = self.engine.scheduler.schedule, self.schedule  # type: ignore[method-assign]
        self.likes_merging = False
        self.live: dict[str, Request] = {}
        self.last: dict[str, StepOutput] = {}
        self.num_added = 0
        self.drops = []

    def schedule(self, now_s: float) -> Schedule:
        """The scheduler's own plan, merged wherever that is possible and liked."""
        made = self.plan(now_s)
        keys = {item.request.adapter for item in made.items}
        key = keys.pop() if len(keys) == 1 else None
        merges = self.likes_merging and key is not None and self.merging.can_merge(key)
        return replace(made, merged=key if merges else None)

    @rule()
    def change_mind(self) -> None:
        self.likes_merging = not self.likes_merging

    @rule(key=st.sampled_from(KEYS))
    def merge_between_steps(self, key: AdapterKey) -> None:
        if self.merging.can_merge(key):
            self.merging.merge(key)
            self.engine.check_integrity()

    @rule(
        target=requests,
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20) | st.integers(1, 20).map(lambda length: [*range(length)]),
        max_tokens=st.integers(1, 20),
        adapter=st.none() | st.sampled_from(KEYS),
    )
    def add(self, prompt: list[int], max_tokens: int, adapter: AdapterKey | None) -> object:
        name = f"r{self.num_added}"
        self.num_added += 1
        request = Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0), adapter, arrived_s=0.0)
        try:
            self.engine.add_request(request)
        except ValueError:
            adapter_pages = (adapter and self.residency.num_pages(adapter)) or 0
            assert LAYOUT.pages_for(len(prompt) + max_tokens) + adapter_pages > self.pool.num_pages
            return multiple()
        self.live[name] = request
        return name

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())
            self.engine.check_integrity()

    @rule(count=st.integers(1, 3))
    def land(self, count: int) -> None:
        self.executor.release(count)

    @rule(key=st.sampled_from(KEYS))
    def break_pulls(self, key: AdapterKey) -> None:
        self.puller.failing ^= {key}

    @rule(name=consumes(requests))
    def cancel(self, name: str) -> None:
        has_ended = name not in self.live or self.live[name].state is RequestState.FINISHED  # dropped: the next step says so
        outputs = self.engine.cancel(name)
        assert bool(outputs) != has_ended
        self.take(outputs)

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: AdapterKey) -> None:
        self.drops.append(self.engine.drop(key))

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def take(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            assert output.request_id in self.live, f"{output} came after the last one"
            if output.finish_reason is not None:
                request = self.live.pop(output.request_id)
                assert request.finish_reason is output.finish_reason
                self.check_tokens(request)

    def check_tokens(self, request: Request) -> None:
        """What was emitted, whole or cut short, is what the request alone would have got."""
        weight = 0 if request.adapter is None else weight_and_rank(request.adapter)[0]
        assert request.output_ids == expected_tokens(request.prompt_ids, weight, len(request.output_ids))
        if request.finish_reason is FinishReason.LENGTH:
            assert len(request.output_ids) == request.params.max_tokens
        assert not request.pages

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.executor.release()
            self.take(self.engine.step())
            self.engine.check_integrity()
        assert not self.engine.has_work, "requests are stuck"
        assert not self.live
        for key in KEYS:
            self.drops.append(self.engine.drop(key))
        for _ in range(len(KEYS) + 2):
            self.executor.release()
            self.engine.step()
        assert all(drop.done() for drop in self.drops), "a drop never ended"
        self.residency.reclaimer.reclaim(self.pool.num_pages)
        self.engine.check_integrity()
        assert self.pool.num_free == self.pool.num_pages, f"pages leaked: {self.pool.pages_by_owner()}"


TestServing = ServingMachine.TestCase
TestServing.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
