"""The engine on a tiny model: right tokens whatever the batch, the pool, the chunks and the neighbours."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from gpu_runtime.core import FinishReason
from tests.runtime.engine.rig import InlineExecutor, PeftOracle, Rig, require_parity, write_adapter

PROMPTS = {f"r{at}": [3 + (7 * at + 11 * step) % 300 for step in range(3 + 5 * at)] for at in range(6)}


def test_mixed_batch_equals_peft_one_by_one(model_dir: Path, adapters: list[Path], oracle: PeftOracle) -> None:
    rig = Rig.build(model_dir)
    keys = [rig.source.add(folder, tenant="t") for folder in adapters]
    plan = {name: (prompt, at % 5 - 1) for at, (name, prompt) in enumerate(PROMPTS.items())}
    for at, (name, (prompt, which)) in enumerate(plan.items()):
        rig.add(name, prompt, adapter=None if which < 0 else keys[which], seed=at)
    rig.run()
    for at, (name, (prompt, which)) in enumerate(plan.items()):
        tokens = rig.tokens(name)
        assert len(tokens) == 8
        expected = require_parity(oracle, prompt, tokens, adapter=None if which < 0 else adapters[which])
        for position, logits in enumerate(expected):
            torch.testing.assert_close(rig.recorder.seen[at, len(prompt) + position], logits, rtol=0, atol=1e-3)
    rig.close()


def greedy(
    model_dir: Path, adapters: list[Path], *, names: list[str] | None = None, max_tokens: int = 12, **settings: object
) -> tuple[dict[str, list[int]], Rig]:
    """Tokens of every prompt, each with its own adapter or none, under `settings` of the engine."""
    rig = Rig.build(model_dir, **settings)
    keys = [None, *(rig.source.add(folder, tenant="t") for folder in adapters)]
    for name in names or list(PROMPTS):
        at = list(PROMPTS).index(name)
        rig.add(name, PROMPTS[name], adapter=keys[at % len(keys)], seed=at, max_tokens=max_tokens)
    rig.run()
    rig.close()
    return {name: rig.tokens(name) for name in rig.outputs}, rig


@pytest.fixture(scope="module")
def expected(model_dir: Path, adapters: list[Path]) -> dict[str, list[int]]:
    return {name: greedy(model_dir, adapters, names=[name])[0][name] for name in PROMPTS}


@pytest.mark.parametrize("step_tokens", [8, 9, 17, 512])
def test_neighbours_and_chunk_size_change_nothing(
    model_dir: Path, adapters: list[Path], expected: dict[str, list[int]], step_tokens: int
) -> None:
    assert greedy(model_dir, adapters, max_step_tokens=step_tokens)[0] == expected


def test_order_of_arrival_changes_nothing(model_dir: Path, adapters: list[Path], expected: dict[str, list[int]]) -> None:
    assert greedy(model_dir, adapters, names=list(reversed(PROMPTS)))[0] == expected


def test_eviction_and_reload_change_nothing(model_dir: Path, adapters: list[Path], expected: dict[str, list[int]]) -> None:
    tokens, rig = greedy(model_dir, adapters, num_slots=1, host_cache_bytes=0)
    assert tokens == expected
    assert rig.engine.residency.num_evictions >= 3


def test_preemption_changes_nothing(model_dir: Path, adapters: list[Path]) -> None:
    want, _ = greedy(model_dir, adapters, max_tokens=40)
    tokens, rig = greedy(model_dir, adapters, max_tokens=40, pool_pages=20)
    assert tokens == want
    assert rig.engine.scheduler.num_preemptions > 0


def test_seeded_samples_depend_on_nothing_but_seed_and_position(model_dir: Path, adapters: list[Path]) -> None:
    def sampled(names: list[str], **settings: int) -> dict[str, list[int]]:
        rig = Rig.build(model_dir, **settings)
        key = rig.source.add(adapters[0], tenant="t")
        for at, name in enumerate(names):
            rig.add(name, PROMPTS["r2"], adapter=key, seed=int(name), temperature=1.3, top_p=0.9, max_tokens=30, top_k=at % 2 * 50)
        rig.run()
        return {name: rig.tokens(name) for name in names}

    alone = {**sampled(["1"]), **sampled(["2"])}
    crowd = sampled(["1", "4", "2", "3"], pool_pages=16)
    assert crowd["1"] == alone["1"]
    assert len({tuple(tokens) for tokens in crowd.values()}) > 1
    assert sampled(["1", "2"])["1"] != sampled(["2", "1"])["2"]
    assert sampled(["0", "2"])["0"] == sampled(["0"])["0"]


def test_unseeded_requests_differ(model_dir: Path) -> None:
    rig = Rig.build(model_dir)
    for name in "abcd":
        rig.add(name, PROMPTS["r1"], temperature=2.0, max_tokens=12)
    rig.run()
    assert len({tuple(rig.tokens(name)) for name in "abcd"}) > 1


@pytest.mark.parametrize("fill", [float("nan"), 1e30, float("inf")])
def test_a_poisoned_neighbour_changes_no_bit_of_mine(model_dir: Path, adapters: list[Path], tmp_path: Path, fill: float) -> None:
    """The neighbour keeps its shapes and its steps, only its weights change. Its long prompt shares many steps with my answer."""

    def logits_beside(neighbour: Path) -> tuple[Rig, dict[tuple[int, int], torch.Tensor]]:
        rig = Rig.build(model_dir, max_step_tokens=16, executor=InlineExecutor())
        own, other = (rig.source.add(folder, tenant=tenant) for tenant, folder in (("me", adapters[0]), ("you", neighbour)))
        rig.add("mine", PROMPTS["r1"], adapter=own, seed=1, max_tokens=20)
        rig.add("base", PROMPTS["r0"], seed=2, max_tokens=20)
        rig.add("theirs", [5] * 120, adapter=other, seed=3, max_tokens=1)
        rig.run()
        rig.close()
        return rig, {key: value for key, value in rig.recorder.seen.items() if key[0] != 3}

    healthy, want = logits_beside(write_adapter(tmp_path / "healthy", model_dir, rank=8, seed=9))
    poisoned, got = logits_beside(write_adapter(tmp_path / "poisoned", model_dir, rank=8, seed=9, fill=fill))
    assert healthy.outputs["theirs"][-1].error is None
    assert poisoned.outputs["theirs"][-1].finish_reason is not None
    if math.isnan(fill):
        assert "NaN" in str(poisoned.outputs["theirs"][-1].error)
    assert [poisoned.tokens(name) for name in ("mine", "base")] == [healthy.tokens(name) for name in ("mine", "base")]
    assert len(got) == 40
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_an_end_of_sequence_token_ends_the_request_unless_ignored(model_dir: Path, tmp_path: Path) -> None:
    """End tokens come from config.json and from generation_config.json."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    rig = Rig.build(folder)
    rig.add("r", PROMPTS["r1"], max_tokens=10)
    rig.run()
    tokens = rig.tokens("r")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, tokens[4]]}))
    rig = Rig.build(folder)
    rig.add("ends", PROMPTS["r1"], max_tokens=10, ignore_eos=False)
    rig.add("ignores", PROMPTS["r1"], max_tokens=10)
    rig.run()
    assert rig.tokens("ends") == tokens[: tokens.index(tokens[4]) + 1]
    assert rig.outputs["ends"][-1].finish_reason is FinishReason.STOP
    assert rig.tokens("ignores") == tokens


def test_logprobs_are_those_of_the_logits(model_dir: Path) -> None:
    rig = Rig.build(model_dir)
    rig.add("r", PROMPTS["r1"], seed=5, temperature=1.5, logprobs=3, max_tokens=4)
    rig.run()
    for position, output in enumerate(rig.outputs["r"]):
        want = rig.recorder.seen[5, len(PROMPTS["r1"]) + position].log_softmax(-1)
        assert output.logprob is not None
        assert output.logprob.logprob == pytest.approx(float(want[output.token_id]), abs=1e-5)
        assert [token for token, _ in output.logprob.top] == want.topk(3).indices.tolist()


def test_a_pool_that_holds_no_page_is_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="give the pool more"):
        Rig.build(model_dir, pool_bytes=1000)
