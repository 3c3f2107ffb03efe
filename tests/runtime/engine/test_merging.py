"""Merged mode on a tiny model: the same logits, exact ways back, and nobody's bytes lost when the range is taken."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpu_runtime.core import AdapterKey
from gpu_runtime.scheduling.scheduler import Schedule
from tests.runtime.engine.rig import InlineExecutor, PeftOracle, Rig, require_parity

PROMPTS = [[3 + (7 * at + 11 * step) % 300 for step in range(3 + 5 * at)] for at in range(6)]


def plan_merged(rig: Rig, key: AdapterKey, *, when: Callable[[], bool] = lambda: True) -> list[AdapterKey | None]:
    """Steps of `key`'s requests alone run merged while `when` holds; the modes of all steps."""
    plain, modes = rig.engine.scheduler.schedule, []

    def schedule(now_s: float) -> Schedule:
        made = plain(now_s)
        alone = bool(made.items) and all(item.request.adapter == key for item in made.items)
        chosen = key if alone and when() and rig.engine.merging.can_merge(key) else None
        modes.append(chosen)
        return replace(made, merged=chosen)

    rig.engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    return modes


def build(model_dir: Path, **settings: object) -> Rig:
    return Rig.build(model_dir, executor=InlineExecutor(), **settings)


@pytest.mark.parametrize("which", range(4))
def test_merged_logits_are_the_oracles_in_every_mix_of_modes(model_dir: Path, adapters: list[Path], oracle: PeftOracle, which: int) -> None:
    """Steps alternate between the modes, so prompts and answers cross from one into the other."""
    rig = build(model_dir)
    key = rig.source.add(adapters[which], tenant="t")
    steps = iter(range(10**6))
    modes = plan_merged(rig, key, when=lambda: next(steps) % 3 != 1)
    for at, prompt in enumerate(PROMPTS):
        rig.add(f"r{at}", prompt, adapter=key, seed=at)
    rig.run()
    rig.close()
    assert {None, key} == set(modes)
    for at, prompt in enumerate(PROMPTS):
        for position, want in enumerate(require_parity(oracle, prompt, rig.tokens(f"r{at}"), adapter=adapters[which])):
            torch.testing.assert_close(rig.recorder.seen[at, len(prompt) + position], want, rtol=0, atol=1e-3)


def base_logits(rig: Rig, seed: int) -> torch.Tensor:
    rig.add(f"base{seed}", PROMPTS[2], seed=seed, max_tokens=1)
    rig.run()
    return rig.recorder.seen[seed, len(PROMPTS[2])]


def base_bytes(rig: Rig) -> list[torch.Tensor]:
    return [matrix.weight.data.clone() for matrix in rig.engine.merging._decoder.matrices]


@pytest.mark.parametrize("cycles", [40, pytest.param(1000, marks=pytest.mark.full)])
def test_merging_again_and_again_leaves_not_one_bit(model_dir: Path, adapters: list[Path], cycles: int) -> None:
    """Two adapters in turn, so that every merge is written anew."""
    rig = build(model_dir)
    keys = [rig.source.add(folder, tenant="t") for folder in adapters[:2]]
    for at, key in enumerate(keys):
        rig.add(f"r{at}", PROMPTS[at], adapter=key, max_tokens=1)
    rig.run()
    merging = rig.engine.merging
    weights, logits = base_bytes(rig), base_logits(rig, 1)
    for cycle in range(cycles):
        merging.merge(keys[cycle % 2])
        merging.unmerge()
    assert merging.num_merges == cycles
    assert all(one.equal(other) for one, other in zip(base_bytes(rig), weights, strict=True))
    assert base_logits(rig, 2).equal(logits)
    rig.close()


def test_a_copy_that_nobody_needed_to_displace_is_found_again(model_dir: Path, adapters: list[Path]) -> None:
    rig = build(model_dir)
    key = rig.source.add(adapters[0], tenant="t")
    rig.add("r", PROMPTS[0], adapter=key, max_tokens=1)
    rig.run()
    merging, pool = rig.engine.merging, rig.engine.pool
    for _ in range(3):
        merging.merge(key)
        merging.unmerge()
    assert merging.num_merges == 1
    assert rig.engine.residency.reclaimer.reclaim(pool.num_pages)
    assert merging.copied is None
    assert pool.num_free == pool.num_pages
    rig.close()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 12))])
def test_taking_the_range_moves_everyone_and_changes_no_bit(model_dir: Path, adapters: list[Path], seed: int) -> None:
    """The pool is filled at random, then merged and unmerged between random steps; the tokens of all are those of no merging."""

    def serve(*, merges: bool) -> tuple[dict[str, list[int]], Rig]:
        rng = random.Random(seed)
        rig = build(model_dir, pool_pages=75, max_step_tokens=48)
        keys = [rig.source.add(folder, tenant="t") for folder in adapters]
        for at in range(14):
            prompt = [rng.randrange(3, 300) for _ in range(rng.randrange(1, 90))]
            rig.add(f"r{at}", prompt, adapter=rng.choice([None, *keys]), seed=at, max_tokens=rng.randrange(1, 30))
        for _ in range(5000):
            if not rig.engine.has_work:
                break
            for _ in range(rng.randrange(1, 4)):
                rig.step()
            key = rng.choice(keys)
            if merges and rig.engine.merging.can_merge(key):
                kv = kv_of_all(rig)
                rig.engine.merging.merge(key)
                rig.engine.check_integrity()
                assert kv_of_all(rig) == kv
                rig.engine.merging.unmerge()
        return {name: rig.tokens(name) for name in rig.outputs}, rig

    want, _ = serve(merges=False)
    got, rig = serve(merges=True)
    assert got == want
    rig.close()
    assert rig.engine.merging.num_merges > 3


def kv_of_all(rig: Rig) -> dict[str, bytes]:
    """Bytes of every running request's pages, in token order."""
    running = rig.engine.scheduler.running
    return {ticket.request.request_id: rig.engine.pool.data[ticket.request.pages].numpy().tobytes() for ticket in running}


def test_requests_and_adapters_move_out_of_the_range(model_dir: Path, adapters: list[Path]) -> None:
    rig = build(model_dir)
    keys = [rig.source.add(folder, tenant="t") for folder in adapters]
    for at, key in enumerate(keys):
        rig.add(f"r{at}", PROMPTS[3], adapter=key, seed=at, max_tokens=12)
    rig.run(until=lambda: len(rig.outputs) == 4)
    rig.engine.merging.merge(keys[1])
    assert rig.engine.merging.num_moved_pages > 0
    rig.engine.check_integrity()
    rig.run()
    rig.close()
    alone = build(model_dir)
    for at, folder in enumerate(adapters):
        alone.add(f"r{at}", PROMPTS[3], adapter=alone.source.add(folder, tenant="t"), seed=at, max_tokens=12)
        alone.run()
        assert alone.tokens(f"r{at}") == rig.tokens(f"r{at}")


def test_a_dropped_adapters_copy_is_zeroed_even_while_merged(model_dir: Path, adapters: list[Path]) -> None:
    rig = build(model_dir, poison_freed=False)
    key = rig.source.add(adapters[0], tenant="t")
    rig.add("r", PROMPTS[0], adapter=key, max_tokens=6)
    rig.run(until=lambda: "r" in rig.outputs)
    merging, pool = rig.engine.merging, rig.engine.pool
    merging.merge(key)
    pages = [page for page in range(pool.num_pages) if pool.owner_of(page) == "merged"]
    assert pool.data[pages].any()
    done = rig.engine.drop(key)
    assert merging.merged is None
    assert not pool.data[pages].any()
    rig.run()
    assert len(rig.tokens("r")) == 6
    assert done.done()
    assert not merging.can_merge(key)
    rig.close()


def test_too_small_a_pool_says_why_nothing_is_merged(model_dir: Path, adapters: list[Path]) -> None:
    rig = build(model_dir, pool_pages=40)
    key = rig.source.add(adapters[0], tenant="t")
    rig.add("r", PROMPTS[0], adapter=key, max_tokens=1)
    rig.run()
    assert not rig.engine.merging.can_merge(key)
    assert "of the pool's 40 pages" in str(rig.engine.merging.why_off)
    assert build(model_dir).engine.merging.why_off is None
