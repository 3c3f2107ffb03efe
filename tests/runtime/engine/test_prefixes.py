"""Shared K and V: who may share, that nobody's tokens change, and how blocks leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpu_runtime.core import AdapterKey, Request, SamplingParams
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.scheduling.prefixes import Prefixes
from gpu_runtime.scheduling.scheduler import Schedule
from tests.runtime.engine.rig import InlineExecutor, Rig

PROMPT = [3 + 11 * step % 300 for step in range(50)]  # 3 full blocks and two tokens


def cached(
    rig: Rig, name: str, prompt: list[int] = PROMPT, *, adapter: AdapterKey | None = None, tenant: str = "t", **params: object
) -> int:
    """Serve one request; how many of its tokens were in the pool."""
    asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, "seed": len(rig.outputs), **params})  # type: ignore[arg-type]
    rig.engine.add_request(Request(name, tuple(prompt), asked, adapter, arrived_s=0.0, tenant=tenant))
    rig.run()
    return rig.outputs[name][-1].num_cached


def test_full_blocks_are_shared_and_no_token_changes(model_dir: Path) -> None:
    rig, plain = Rig.build(model_dir), Rig.build(model_dir, prefix_caching=False)
    prompts = {
        "first": PROMPT,
        "same": PROMPT,
        "longer": [*PROMPT, 7, 8, 9],
        "two blocks": PROMPT[:33],
        "shorter": PROMPT[:32],
        "other": PROMPT[1:],
    }
    assert [cached(rig, name, prompt) for name, prompt in prompts.items()] == [0, 48, 48, 32, 16, 0]
    assert [cached(plain, name, prompt) for name, prompt in prompts.items()] == [0] * 6
    assert {name: rig.tokens(name) for name in prompts} == {name: plain.tokens(name) for name in prompts}
    assert all(rig.recorder.seen[key].equal(value) for key, value in plain.recorder.seen.items())
    assert rig.engine.state().counts.num_prefix_hit_tokens == 144
    rig.close()


def test_an_answer_is_a_prefix_of_what_follows_it(model_dir: Path) -> None:
    rig = Rig.build(model_dir)
    cached(rig, "question", PROMPT[:20], max_tokens=16)
    assert cached(rig, "follow-up", [*PROMPT[:20], *rig.tokens("question"), 5]) == 32
    rig.close()


def test_nothing_crosses_tenants_adapters_or_a_repush(model_dir: Path, adapters: list[Path]) -> None:
    rig = Rig.build(model_dir, executor=InlineExecutor())
    own, other = (rig.source.add(folder, tenant="t") for folder in adapters[:2])
    foreign = rig.source.add(adapters[0], tenant="u")
    assert own.form_digest == foreign.form_digest
    asked = {"base": (None, "t"), "base of another": (None, "u"), "own": (own, "t"), "other": (other, "t"), "foreign": (foreign, "u")}
    for name, (adapter, tenant) in asked.items():
        assert cached(rig, name, adapter=adapter, tenant=tenant) == 0, name
    for name, (adapter, tenant) in asked.items():
        assert cached(rig, f"{name} again", adapter=adapter, tenant=tenant) == 48, name
        assert rig.tokens(name) == rig.tokens(f"{name} again")
    rig.close()


def test_a_dropped_adapters_blocks_are_zeroed_and_found_no_more(model_dir: Path, adapters: list[Path]) -> None:
    rig = Rig.build(model_dir, executor=InlineExecutor(), poison_freed=False)
    key = rig.source.add(adapters[0], tenant="t")
    cached(rig, "idle", adapter=key)
    pool = rig.engine.pool
    rig.add("runs", [*PROMPT, 9], adapter=key, max_tokens=8)
    rig.step()
    pages = [page for page in range(pool.num_pages) if pool.owner_of(page) == "prefix"]
    done = rig.engine.drop(key)
    rig.engine.check_integrity()
    assert not done.done()
    rig.run()
    assert done.done()
    assert len(pages) >= 3
    assert not pool.data[pages].any()
    assert pool.num_free == pool.num_pages
    rig.close()


def test_what_merged_mode_computed_is_not_for_requests_pinned_to_unmerged(model_dir: Path, adapters: list[Path]) -> None:
    rig = Rig.build(model_dir, executor=InlineExecutor())
    key = rig.source.add(adapters[0], tenant="t")
    plain = rig.engine.scheduler.schedule

    def merged(now_s: float) -> Schedule:
        made = plain(now_s)
        return replace(made, merged=key if made.items and rig.engine.merging.can_merge(key) else None)

    rig.engine.scheduler.schedule = merged  # type: ignore[method-assign]
    cached(rig, "merged", adapter=key)
    rig.engine.scheduler.schedule = plain  # type: ignore[method-assign]
    assert cached(rig, "pinned", adapter=key, deterministic=True) == 0
    assert cached(rig, "pinned again", adapter=key, deterministic=True) == 48
    assert cached(rig, "any", adapter=key) == 48
    rig.close()


def test_requests_at_once_end_up_in_the_same_pages(model_dir: Path) -> None:
    rig = Rig.build(model_dir)
    for at in range(4):
        rig.add(f"r{at}", PROMPT, seed=at, max_tokens=20)
    rig.run(until=lambda: len(rig.outputs) == 4)
    pages = [ticket.request.pages[:3] for ticket in rig.engine.scheduler.running]
    assert pages == [pages[0]] * 4
    rig.run()
    assert len({tuple(rig.tokens(f"r{at}")) for at in range(4)}) == 1
    rig.close()


def test_idle_blocks_leave_for_running_requests_and_a_preempted_one_finds_its_own(model_dir: Path) -> None:
    def serve(**settings: object) -> tuple[dict[str, list[int]], Rig]:
        rig = Rig.build(model_dir, **settings)
        for at in range(12):
            rig.add(f"r{at}", [3 + (at * 17 + 7 * step) % 300 for step in range(20 + at)], seed=at, max_tokens=60)
        rig.run()
        rig.close()
        return {name: rig.tokens(name) for name in rig.outputs}, rig

    want, _ = serve(prefix_caching=False)
    got, rig = serve(pool_pages=16)
    assert got == want
    assert rig.engine.scheduler.num_preemptions > 0
    assert rig.engine.state().counts.num_prefix_evictions > 0
    assert rig.engine.state().counts.num_prefix_hit_tokens > 0


def test_a_block_that_was_met_outlives_newer_ones_that_were_not() -> None:
    pool = PagePool(num_pages=8, page_bytes=64)
    prefixes = Prefixes(pool, tokens_per_page=4)

    def serve(name: str, tokens: list[int]) -> int:
        request = Request(name, tuple(tokens), SamplingParams(), None, arrived_s=0.0, tenant="t")
        prefixes.attach(request)
        prefixes.admitted(request)
        shared = request.num_computed
        request.pages += pool.allocate(-(-len(tokens) // 4) - len(request.pages), owner=f"kv:{name}")
        request.num_computed = len(tokens)
        prefixes.extend(request)
        prefixes.release(request)
        prefixes.check_integrity()
        return shared

    assert [serve("a", [1] * 5), serve("b", [1] * 5)] == [0, 4]
    for fresh in range(3):
        serve(f"c{fresh}", [10 + fresh] * 5)
    offers = sorted(prefixes.offers(), key=lambda offer: offer[0].chance)
    for _, leave in offers[:3]:
        leave()
    assert serve("d", [1] * 5) == 4
    assert pool.num_free == 7


@pytest.mark.parametrize("enabled", [True, False])
def test_the_pool_map_says_who_lies_where(model_dir: Path, adapters: list[Path], enabled: bool) -> None:
    rig = Rig.build(model_dir, executor=InlineExecutor(), prefix_caching=enabled)
    key = rig.source.add(adapters[0], tenant="t")
    cached(rig, "r", adapter=key)
    rig.engine.merging.merge(key)
    seen = rig.engine.pool_map()
    assert sum(seen["pool"]["pages"].values()) == sum(run["count"] for run in seen["pool"]["runs"]) == rig.engine.pool.num_pages
    assert seen["pool"]["pages"]["idle_prefix"] == (3 if enabled else 0)
    assert seen["pool"]["pages"]["merged"] > 0
    assert seen["merged"]["adapter"] == {"tenant": "t", "form_digest": key.form_digest}
    assert [slot["form_digest"] for slot in seen["slots"].values()] == [key.form_digest]
    rig.close()
