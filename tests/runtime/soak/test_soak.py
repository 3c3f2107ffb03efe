"""The engine under random work at a small pool, with its threads, tiers and files: nothing leaks, nobody's tokens change.

Arrivals, cancels, moves of aliases, drops and mode switches come at random by one seed. Every few seconds all of it ends, and what is
left is counted: pages, handles, slots, requests alive in memory, file descriptors, threads, resident bytes.
`LORARY_TEST_SOAK_S` sets the length of the long one (1800), `LORARY_TEST_SOAK_SEED` its seed.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from gpu_runtime.adapters.handle import Handle
from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.config import RuntimeConfig
from gpu_runtime.core import AdapterKey, FinishReason, Request, SamplingParams, StepOutput
from gpu_runtime.engine.build import build_engine
from gpu_runtime.engine.engine import Engine
from gpu_runtime.engine.loop import EngineLoop, EngineStopped
from gpu_runtime.scheduling.mode import UNMERGED, Mode, View, merged_mode
from gpu_runtime.scheduling.queues import Ticket
from tests.runtime.engine.rig import BASE_DIGEST, page_bytes, write_adapter
from tests.tiny import make_tiny_model

NUM_ADAPTERS, NUM_ALIASES, POOL_PAGES, NUM_SLOTS = 14, 6, 60, 5
ROUND_S = 3.0  # of random work, then everything ends
WARM_ROUNDS = 3  # caches, arenas and histories fill
MAX_GROWTH_BYTES = 24 << 20  # resident, from the warm rounds to the end: allocators are not exact, leaks of half an hour are larger
PROMPTS = 5


@dataclass
class Whim:
    """A policy that merges, while it likes to, whichever adapter can be; the planner still bounds how long others are passed over."""

    random: random.Random
    likes_merging: bool = False
    num_switches: int = 0

    def choose(self, view: View) -> Iterator[Mode]:
        keys = sorted({one.adapter for one in view.queue if one.adapter is not None and one.mergeable})
        if self.likes_merging and keys:
            key = view.merged if view.merged in keys and self.random.random() < 0.9 else self.random.choice(keys)
            if key == view.merged or view.can_merge(key):
                yield merged_mode(key)
        yield UNMERGED

    def changed(self, *, was_merged: bool, switch_s: float) -> None:
        self.num_switches += 1


@dataclass
class Soak:
    """One engine, its loop and the random hand that moves both."""

    engine: Engine
    source: LocalSource
    folders: dict[AdapterKey, Path]
    random: random.Random
    aliases: dict[str, AdapterKey] = field(default_factory=dict)
    ends: dict[str, Future[FinishReason]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    asked: dict[str, tuple[Request, int]] = field(default_factory=dict)  # a request and its prompt
    truth: dict[tuple[AdapterKey | None, int], list[int]] = field(default_factory=dict)
    drops: list[Future[None]] = field(default_factory=list)
    num_added: int = 0
    num_checked: int = 0

    def __post_init__(self) -> None:
        self.loop = EngineLoop(self.engine)
        self.whim = Whim(random.Random(self.random.random()))
        self.engine.scheduler._planner._policy = self.whim
        self.aliases = {f"alias-{number}": self.random.choice(list(self.folders)) for number in range(NUM_ALIASES)}
        self.loop.start()

    # ---- random work ----

    def act(self) -> None:
        weights = {self.ask: 60, self.cancel: 15, self.move_alias: 12, self.drop: 5, self.change_mode: 8}
        self.random.choices(list(weights), list(weights.values()))[0]()

    def ask(self) -> None:
        adapter = None if self.random.random() < 0.15 else self.aliases[self.random.choice(list(self.aliases))]
        name, prompt = f"r{self.num_added}", self.random.randrange(PROMPTS)
        self.num_added += 1
        params = SamplingParams(max_tokens=self.random.randint(1, 24), temperature=0.0, ignore_eos=True)
        ids = tuple(3 + (7 * prompt + 3 * at) % 90 for at in range(4 + 9 * prompt))
        deadline_s = time.monotonic() + 0.2 if self.random.random() < 0.05 else None
        request = Request(name, ids, params, adapter, arrived_s=time.monotonic(), deadline_s=deadline_s)
        self.ends[name], self.tokens[name], self.asked[name] = Future(), [], (request, prompt)
        try:
            self.loop.submit(request, grant=None, sink=self.hear)
        except EngineStopped:  # as many wait as may
            del self.ends[name], self.tokens[name], self.asked[name]

    def hear(self, output: StepOutput) -> None:
        if output.token_id is not None:
            self.tokens[output.request_id].append(output.token_id)
        if output.finish_reason is not None:
            self.ends[output.request_id].set_result(output.finish_reason)

    def cancel(self) -> None:
        running = [name for name, end in self.ends.items() if not end.done()]
        if running:
            self.loop.cancel(self.random.choice(running))

    def move_alias(self) -> None:
        self.aliases[self.random.choice(list(self.aliases))] = self.random.choice(list(self.folders))

    def drop(self) -> None:
        """As the registry says where an adapter was deleted; an alias that still names it pulls it anew: it was restored."""
        self.drops.append(self.loop.drop(self.random.choice(list(self.folders))))

    def change_mode(self) -> None:
        self.whim.likes_merging = not self.whim.likes_merging

    # ---- rounds ----

    def round(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.act()
            time.sleep(self.random.expovariate(400.0))
        self.come_to_rest()

    def come_to_rest(self) -> None:
        """Every request ends, every drop is done; each answer of unmerged steps is a prefix of the one that its adapter always gives."""
        for end in self.ends.values():
            end.result(timeout=60)
        for drop in self.drops:
            drop.result(timeout=60)
        for name, (request, prompt) in self.asked.items():
            if request.is_exact:  # merged weights are rounded: greedy choices between near equals may differ
                self._check(self.tokens[name], self.truth.setdefault((request.adapter, prompt), []), name=name)
                self.num_checked += 1
        self.ends.clear()
        self.tokens.clear()
        self.asked.clear()
        self.drops.clear()
        self.loop.inspect().result(timeout=10)  # the step that ended the last one is over

    def _check(self, tokens: list[int], known: list[int], *, name: str) -> None:
        shared = min(len(tokens), len(known))
        assert tokens[:shared] == known[:shared], f"{name} says {tokens}, the same was {known} before"
        known += tokens[shared:]

    # ---- what is left ----

    def require_nothing_left(self) -> None:
        found = self.loop.inspect().result(timeout=10)
        uses = found["pool"]["pages"]
        assert uses.get("kv", 0) == 0, f"pages of requests remain: {uses}"
        assert all(slot["num_handles"] == 0 for slot in found["slots"].values()), "a handle remains"
        assert (uses["adapter"], uses["prefix"]) == (0, 0), f"pages of idle adapters or prefixes count as used: {uses}"
        assert (found["running"]["total"], found["waiting"]["total"]) == (0, 0)
        self.engine.check_integrity()  # the loop sleeps: nothing runs and nothing waits

    def close(self) -> None:
        self.loop.stop()
        self.engine.check_integrity()


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    num_alive: int
    num_files: int
    num_threads: int
    num_bytes: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        alive = sum(type(one) in (Request, Ticket, Handle) for one in gc.get_objects())  # isinstance would touch every object's class
        process = psutil.Process()
        return cls(alive, process.num_fds(), threading.active_count(), process.memory_info().rss)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("soak") / "model")


def make_soak(model_dir: Path, tmp_path: Path, *, seed: int) -> Soak:
    hand = random.Random(seed)
    source = LocalSource(base_digest=BASE_DIGEST)
    folders = {}
    for number in range(NUM_ADAPTERS):
        folder = write_adapter(tmp_path / f"a{number}", model_dir, rank=hand.choice((2, 4, 8, 16)), seed=number)
        folders[source.add(folder, tenant=f"t{number % 3}")] = folder
    config = RuntimeConfig(
        model_dir,
        pool_bytes=POOL_PAGES * page_bytes(model_dir),
        poison_freed=True,
        num_slots=NUM_SLOTS,
        max_rank=16,
        threads=1,
        host_cache_bytes=12 * page_bytes(model_dir),
        disk_cache_dir=tmp_path / "disk",
        disk_cache_bytes=64 * page_bytes(model_dir),
        max_batch_requests=8,
        max_step_tokens=64,
        max_waiting=40,
        policy="dynamic",
        max_wait_s=2.0,
        merge_share=0.6,
    )
    return Soak(build_engine(config, source, base_digest=BASE_DIGEST), source, folders, hand)


def soak(model_dir: Path, tmp_path: Path, *, seconds: float, seed: int) -> Soak:
    made = make_soak(model_dir, tmp_path, seed=seed)
    try:
        for _ in range(WARM_ROUNDS):
            made.round(ROUND_S / 2)
            made.require_nothing_left()
        before, until = Held.now(), time.monotonic() + seconds
        while time.monotonic() < until:
            made.round(ROUND_S)
            made.require_nothing_left()
            held = Held.now()
            assert held.num_alive <= before.num_alive, f"requests, tickets or handles live on: {before} -> {held} (seed {seed})"
            assert held.num_files <= before.num_files, f"files stay open: {before} -> {held} (seed {seed})"
            assert held.num_threads <= before.num_threads, f"threads stay: {before} -> {held} (seed {seed})"
            assert held.num_bytes <= before.num_bytes + MAX_GROWTH_BYTES, f"memory grows: {before} -> {held} (seed {seed})"
    finally:
        made.close()
    assert made.num_checked > 50
    assert made.engine.residency.num_evictions > 0, "the pool was never small"
    assert made.engine.merging.num_merges > 1
    assert made.whim.num_switches > 10, "it hardly switched modes"
    return made


def test_a_slice_of_the_soak(model_dir: Path, tmp_path: Path) -> None:
    soak(model_dir, tmp_path, seconds=12.0, seed=1)


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
def test_the_soak(model_dir: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("LORARY_TEST_SOAK_SEED", "0")) or time.time_ns() % 10**6
    print(f"seed {seed}")
    soak(model_dir, tmp_path, seconds=float(os.environ.get("LORARY_TEST_SOAK_S", "1800")), seed=seed)
