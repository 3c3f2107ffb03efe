"""Logprobs of prompts, and what may end a text: eos, stop tokens, not before min_tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from gpu_runtime.core import FinishReason, TokenLogprob
from tests.runtime.engine.rig import PeftOracle, Rig, write_adapter

EOS = 2


def test_prompts_are_scored_as_the_oracle_does_however_they_are_cut(model_dir: Path, tmp_path: Path) -> None:
    """Longer than a step and than a block of scored rows, with an adapter and without, sent back to the queue half-way."""
    folder = write_adapter(tmp_path / "a", model_dir, rank=4)
    rig = Rig.build(model_dir, max_step_tokens=100, pool_pages=64)
    key = rig.source.add(folder, tenant="t")
    prompt = torch.randint(3, 384, (190,), generator=torch.Generator().manual_seed(0)).tolist()
    rig.add("other", prompt[:20])
    rig.add("base", prompt, prompt_logprobs=3, max_tokens=2)
    request = rig.add("adapted", prompt, adapter=key, prompt_logprobs=0, max_tokens=2)
    rig.add("short", prompt[:1], prompt_logprobs=1, max_tokens=1)
    rig.run(until=lambda: 0 < len(request.prompt_logprobs) < 189)
    rig.engine.scheduler._preempt(rig.engine.scheduler.find("adapted"))  # type: ignore[arg-type]
    rig.run()
    rig.add("again", prompt, prompt_logprobs=3, max_tokens=2)  # its K and V are there as a prefix, its logprobs are not
    rig.run()
    rig.close()
    oracle = PeftOracle(model_dir)
    for name, adapter in (("base", None), ("adapted", folder), ("again", None)):
        first, *later = rig.outputs[name]
        assert all(output.prompt_logprobs is None for output in later)
        _require_scores(first.prompt_logprobs, oracle.logits(prompt, adapter=adapter), prompt, num_top=3 if adapter is None else 0)
    assert rig.outputs["short"][0].prompt_logprobs == ()
    assert rig.outputs["other"][0].prompt_logprobs is None


def _require_scores(scores: tuple[TokenLogprob, ...] | None, logits: torch.Tensor, prompt: list[int], *, num_top: int) -> None:
    assert scores is not None
    want = logits[:-1].log_softmax(-1)
    assert [one.token_id for one in scores] == prompt[1:]
    own = want.gather(1, torch.tensor(prompt[1:])[:, None])
    torch.testing.assert_close(torch.tensor([one.logprob for one in scores]), own[:, 0], rtol=0, atol=1e-3)
    ranks = (want > own).sum(1) + 1
    agreeing = sum(one.rank == rank for one, rank in zip(scores, ranks.tolist(), strict=True))
    assert agreeing > 0.95 * len(scores)  # near ties may swap
    assert all(len(one.top) == num_top and list(one.top) == sorted(one.top, key=lambda pair: -pair[1]) for one in scores)


def test_neither_eos_nor_a_stop_token_comes_before_min_tokens(model_dir: Path) -> None:
    rig = Rig.build(model_dir)
    pushed = {"logit_bias": ((EOS, 100.0),), "ignore_eos": False}
    rig.add("at once", [5, 6], **pushed)
    rig.add("later", [5, 6], min_tokens=4, **pushed)
    rig.add("stop", [5, 6], logit_bias=((7, 100.0),), stop_token_ids=(7,), min_tokens=2)
    rig.add("ignored", [5, 6], logit_bias=((EOS, 100.0),), min_tokens=3)
    rig.run()
    rig.close()
    assert rig.tokens("at once") == [EOS]
    tokens = rig.tokens("later")
    assert len(tokens) == 5
    assert (tokens[-1], EOS in tokens[:-1]) == (EOS, False)
    assert rig.outputs["later"][-1].finish_reason is FinishReason.STOP
    assert rig.tokens("stop")[2:] == [7]
    assert rig.outputs["stop"][-1].finish_reason is FinishReason.STOP
    assert rig.tokens("ignored") == [EOS] * 8
