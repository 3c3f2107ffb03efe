"""Sampling: greedy, temperature, top_k, top_p, seeds, log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gpu_runtime.core import SamplingParams
from gpu_runtime.kernels.sample import FIRST_CANDIDATES, SampleRow, sample, uniform


def draw(logits: torch.Tensor, params: SamplingParams, *, count: int = 4000, seed: int = 5) -> Counter[int]:
    rows = [SampleRow(params, seed, position) for position in range(count)]
    return Counter(int(found.token_id or 0) for found in sample(logits.expand(count, -1), rows))


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 1.0]])
    greedy = SamplingParams(temperature=0)
    assert [found.token_id for found in sample(logits, [SampleRow(greedy, 0, 0)] * 2)] == [1, 0]


def test_drawn_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        counts = draw(logits, SamplingParams(temperature=temperature))
        expected = (logits / temperature).softmax(-1)
        for token in range(4):  # 4000 draws: five standard deviations are below 0.04
            assert abs(counts[token] / 4000 - float(expected[token])) < 0.04


def test_top_k_keeps_the_k_largest_in_proportion() -> None:
    counts = draw(torch.tensor([1.0, 0.0, 2.0, -1.0]), SamplingParams(top_k=2))
    assert set(counts) == {0, 2}
    assert abs(counts[2] / 4000 - 0.731) < 0.04


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, {2}), (0.6, {2}), (0.7, {0, 2}), (0.96, {0, 1, 2}), (0.999, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])  # softmax 0.237 0.087 0.644 0.032
    assert set(draw(logits, SamplingParams(top_p=top_p))) == kept


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])  # of the two largest: 0.731 and 0.269
    assert set(draw(logits, SamplingParams(top_k=2, top_p=0.73))) == {2}
    assert set(draw(logits, SamplingParams(top_k=2, top_p=0.74))) == {0, 2}


def test_top_p_looks_beyond_the_first_candidates() -> None:
    flat = torch.zeros(4 * FIRST_CANDIDATES)
    counts = draw(flat, SamplingParams(top_p=0.75))
    assert 2.5 * FIRST_CANDIDATES < len(counts) <= 3 * FIRST_CANDIDATES + 1


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.5, top_p=0.9)
    rows = [SampleRow(params, seed, position) for seed, position in [(1, 7), (2, 7), (1, 8)]]
    together = [found.token_id for found in sample(logits, rows)]
    alone = [sample(logits[at : at + 1], [row])[0].token_id for at, row in enumerate(rows)]
    assert together == alone
    assert len({uniform(seed, position) for seed in range(20) for position in range(20)}) == 400


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    [found] = sample(logits, [SampleRow(SamplingParams(temperature=0.3, top_k=1, logprobs=2), 0, 0)])
    expected = logits[0].log_softmax(-1)
    assert found.logprob is not None
    assert found.token_id == found.logprob.token_id == 2
    assert found.logprob.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in found.logprob.top] == [2, 0]
    assert [value for _, value in found.logprob.top] == pytest.approx([float(expected[2]), float(expected[0])])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    logits[2, :9] = -torch.inf
    found = sample(logits, [SampleRow(SamplingParams(temperature=temperature), 0, at) for at in range(3)])
    assert found[0].token_id is not None
    assert found[1].token_id is None
    assert found[2].token_id == 9


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])  # softmax 0.237 0.087 0.644 0.032: of the largest 0.37 0.135 1 0.05
    assert set(draw(logits, SamplingParams(min_p=0.3))) == {0, 2}
    assert set(draw(logits, SamplingParams(min_p=0.1))) == {0, 1, 2}
    assert set(draw(logits, SamplingParams(min_p=1.0))) == {2}
    assert set(draw(logits, SamplingParams(min_p=0.1, top_p=0.9))) == {0, 2}, "top_p is of what min_p left: 0.911 of 0.968"


def chosen(logits: list[float], params: SamplingParams, *, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> int | None:
    return sample(torch.tensor([logits]), [SampleRow(params, 0, 9, prompt, output)])[0].token_id


def test_frequency_and_presence_penalties_count_the_output_alone() -> None:
    frequency = SamplingParams(temperature=0, frequency_penalty=0.6)
    assert chosen([2.0, 1.0, 0.0], frequency, prompt=[0, 0, 0]) == 0
    assert chosen([2.0, 1.0, 0.0], frequency, output=[0]) == 0
    assert chosen([2.0, 1.0, 0.0], frequency, output=[0, 0]) == 1
    presence = SamplingParams(temperature=0, presence_penalty=0.9)
    assert chosen([2.0, 1.0, 0.0], presence, output=[0, 0, 0, 0]) == 0
    assert chosen([2.0, 1.2, 0.0], presence, output=[0]) == 1
    assert chosen([2.0, 1.0, 0.0], SamplingParams(temperature=0, presence_penalty=-2.0), output=[2, 2]) == 0
    assert chosen([2.0, 1.0, 0.1], SamplingParams(temperature=0, presence_penalty=-2.0), output=[2, 2]) == 2


def test_the_repetition_penalty_shrinks_what_prompt_or_output_holds_towards_unlikely() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.5)
    assert chosen([2.0, 1.0, -1.0], params, prompt=[0]) == 1
    assert chosen([2.0, 1.0, -1.0], params, output=[0, 0, 0]) == 1, "once or often is the same"
    assert chosen([-1.0, -2.0, -3.0], params, prompt=[0]) == 1, "a negative logit is multiplied"


def test_biases_force_and_forbid_and_leave_logprobs_alone() -> None:
    assert chosen([2.0, 1.0, 0.0], SamplingParams(temperature=0, logit_bias=((0, -100.0),))) == 1
    assert chosen([2.0, 1.0, 0.0], SamplingParams(temperature=0, logit_bias=((2, 100.0), (0, 1.0)))) == 2
    assert set(draw(torch.tensor([2.0, 1.0, 0.0]), SamplingParams(logit_bias=((1, 100.0),)))) == {1}
    params = SamplingParams(temperature=0, logprobs=0, logit_bias=((2, 100.0),))
    [found] = sample(torch.tensor([[2.0, 1.0, 0.0]]), [SampleRow(params, 0, 0)])
    assert found.logprob is not None
    assert found.logprob.logprob == pytest.approx(float(torch.tensor([2.0, 1.0, 0.0]).log_softmax(-1)[2]))


@pytest.mark.parametrize(
    "wrong",
    [{"min_p": 1.5}, {"frequency_penalty": 3.0}, {"presence_penalty": -2.1}, {"repetition_penalty": 0.0}, {"logit_bias": ((1, 101.0),)}],
)
def test_parameters_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
