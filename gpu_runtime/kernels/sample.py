"""Owns the choice of the next token from logits.

The random number of a token is a pure function of (seed, position), so a request that was preempted and computed
again, or that shares its batch with others, draws the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_runtime.core import SamplingParams, TokenLogprob

FIRST_CANDIDATES = 256  # top_p looks at this many largest tokens before it looks at more


@dataclass(frozen=True)
class SampleRow:
    """`seed` is the request's own or one drawn when it arrived; `position` is the index of the token to be chosen.

    `prompt_ids` and `output_ids` are what penalties count; `forbidden` are tokens that may not be chosen.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    forbidden: Sequence[int] = ()


@dataclass(frozen=True)
class Sampled:
    """`token_id` is None where the row's logits are not finite: the request must fail, not continue."""

    token_id: int | None
    logprob: TokenLogprob | None = None


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One token for each row of logits (N, vocab) f32. Log-probabilities are those of the unmodified distribution."""
    assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} requests"
    best = logits.argmax(dim=-1)  # NaN counts as the largest, so a bad row shows in its maximum
    peaks = logits.gather(1, best[:, None]).squeeze(1).isfinite().tolist()
    greedy = best.tolist()
    return [_sample_row(logits[at], row, greedy[at]) if peaks[at] else Sampled(None) for at, row in enumerate(rows)]


def _sample_row(logits: torch.Tensor, row: SampleRow, greedy: int) -> Sampled:
    scores = _changed(logits, row) if row.params.changes_logits or row.forbidden else logits
    token = _draw(scores, row) if row.params.temperature else greedy if scores is logits else int(scores.argmax())
    if row.params.logprobs is None:
        return Sampled(token)
    return Sampled(token, _logprob(logits, token, row.params.logprobs))


def _changed(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """Logits (vocab) after repetition, frequency and presence penalty, bias and ban, in this order."""
    params, scores = row.params, logits.clone()
    if params.repetition_penalty != 1.0:
        seen = _tensor_like(sorted({*row.prompt_ids, *row.output_ids}), logits)
        scores[seen] = torch.where(scores[seen] > 0, scores[seen] / params.repetition_penalty, scores[seen] * params.repetition_penalty)
    if row.output_ids and (params.frequency_penalty or params.presence_penalty):
        said, counts = torch.unique(_tensor_like(row.output_ids, logits), return_counts=True)
        scores[said] -= params.frequency_penalty * counts + params.presence_penalty
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        scores[_tensor_like(tokens, logits)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    if row.forbidden:
        scores[_tensor_like(row.forbidden, logits)] = -torch.inf
    return scores


def _tensor_like(token_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=logits.device)


def _logprob(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(num_top, logits.shape[0]))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


def score(logits: torch.Tensor, token_ids: Sequence[int], *, num_top: int) -> list[TokenLogprob]:
    """What each row of logits (N, vocab) f32 makes of the token that followed, and its `num_top` likeliest ones."""
    logprobs, tokens = logits.log_softmax(-1), _tensor_like(token_ids, logits)
    own = logprobs.gather(1, tokens[:, None])
    ranks = ((logprobs > own).sum(1) + 1).tolist()
    values, best = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    rows = zip(token_ids, own.squeeze(1).tolist(), best.tolist(), values.tolist(), ranks, strict=True)
    return [TokenLogprob(token, value, tuple(zip(*top, strict=True)), rank) for token, value, *top, rank in rows]


def _draw(logits: torch.Tensor, row: SampleRow) -> int:
    probs = (logits.double() / row.params.temperature).softmax(-1)
    if row.params.min_p > 0:
        probs = torch.where(probs >= row.params.min_p * probs.max(), probs, 0.0)
        probs /= probs.sum()
    candidates, mass = _candidates(probs, row.params)
    sums = mass.cumsum(0)
    at = int(torch.searchsorted(sums, uniform(row.seed, row.position) * sums[-1], right=True))
    at = min(at, mass.shape[0] - 1)
    return at if candidates is None else int(candidates[at])


def _candidates(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Token ids (None = all, in order) and their unnormalised mass after top_k, then top_p over what top_k left."""
    limit = params.top_k if 0 < params.top_k < probs.shape[0] else 0
    if params.top_p >= 1.0:
        if not limit:
            return None, probs
        mass, tokens = probs.topk(limit)
        return tokens, mass
    size = limit or min(FIRST_CANDIDATES, probs.shape[0])
    while True:
        mass, tokens = probs.topk(size)
        wanted = params.top_p * (float(mass.sum()) if limit else 1.0)
        sums = mass.cumsum(0)
        if limit or float(sums[-1]) >= wanted or size == probs.shape[0]:
            keep = min(int((sums < wanted).sum()) + 1, size)  # the smallest set whose mass reaches top_p
            return tokens[:keep], mass[:keep]
        size = min(8 * size, probs.shape[0])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that only (seed, position) decides."""
    return random.Random(f"{seed}/{position}").random()  # noqa: S311 - reproducible sampling, not a secret
