"""One step on the device: rows -> batch -> logits -> next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from gpu_runtime.core import NO_SLOT, AdapterKey
from gpu_runtime.kernels.batch import BatchRow, ForwardBatch, build_batch
from gpu_runtime.kernels.sample import Sampled, SampleRow, sample, score
from gpu_runtime.scheduling.scheduler import Scheduled

Sampler = Callable[[torch.Tensor, Sequence[SampleRow]], list[Sampled]]


class Model(Protocol):
    """What computes a batch; it knows the pool by itself."""

    def hidden(self, batch: ForwardBatch) -> torch.Tensor:
        """What the last layer gives for each token of the batch."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits f32 (N, vocab) of N rows of it."""
        ...


SCORED_ROWS = 64  # of a prompt at once: logits of a whole chunk would take hundreds of megabytes


class Runner:
    """Stateless between steps. `sampler` (logits (N, vocab), rows) is replaceable to watch logits.

    `eos_token_ids` may not be chosen before a request's min_tokens.
    """

    def __init__(
        self,
        model: Model,
        *,
        tokens_per_page: int,
        device: str = "cpu",
        sampler: Sampler = sample,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._model = model
        self._tokens_per_page = tokens_per_page
        self._device = device
        self._sampler = sampler
        self._eos_token_ids = eos_token_ids

    def run(self, items: Sequence[Scheduled], *, merged: AdapterKey | None = None) -> list[tuple[Scheduled, Sampled]]:
        """Compute every item; the choice of the next token for those that sample. With `merged` the weights hold every delta.

        Prompts that are to be scored get the logprobs of the tokens that were computed.
        """
        if not items:
            return []
        assert merged is None or all(item.request.adapter == merged for item in items), "a merged step has another adapter's request"
        ordered = sorted(items, key=lambda item: item.request.slot)  # one segment an adapter
        batch = build_batch(
            [_row(item, merged=merged is not None) for item in ordered], tokens_per_page=self._tokens_per_page, device=self._device
        )
        hidden = self._model.hidden(batch)
        self._score_prompts(ordered, hidden)
        sampling = [item for item in ordered if item.samples]
        rows = [self._sample_row(item) for item in sampling]
        return list(zip(sampling, self._sampler(self._model.logits(hidden[batch.logit_rows]), rows), strict=True))

    def _score_prompts(self, items: Sequence[Scheduled], hidden: torch.Tensor) -> None:
        row = 0
        for item in items:
            if item.request.needs_scores:
                self._score(item, hidden[row : row + item.end - item.start])
            row += item.end - item.start

    def _score(self, item: Scheduled, hidden: torch.Tensor) -> None:
        """What is computed again after a preemption is scored already."""
        request, known = item.request, item.request.prompt_logprobs
        num_top, end = request.params.prompt_logprobs or 0, min(item.end, len(request.prompt_ids) - 1)
        for start in range(max(item.start, len(known)), end, SCORED_ROWS):
            stop = min(start + SCORED_ROWS, end)
            logits = self._model.logits(hidden[start - item.start : stop - item.start])
            known += score(logits, request.prompt_ids[start + 1 : stop + 1], num_top=num_top)

    def _sample_row(self, item: Scheduled) -> SampleRow:
        request, params = item.request, item.request.params
        forbidden: list[int] = []
        if len(request.output_ids) < params.min_tokens:
            forbidden = sorted({*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)})
        return SampleRow(params, item.ticket.seed, request.num_tokens, request.prompt_ids, request.output_ids, forbidden)


def _row(item: Scheduled, *, merged: bool) -> BatchRow:
    request = item.request
    slot = NO_SLOT if merged else request.slot
    return BatchRow(request.tokens(item.start, item.end), item.start, request.pages, slot=slot, wants_logits=item.samples)
