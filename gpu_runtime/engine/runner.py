"""One step on the device: rows -> batch -> logits -> next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from gpu_runtime.core import NO_SLOT, AdapterKey
from gpu_runtime.kernels.batch import BatchRow, ForwardBatch, build_batch
from gpu_runtime.kernels.sample import Sampled, SampleRow, sample
from gpu_runtime.scheduling.scheduler import Scheduled

Sampler = Callable[[torch.Tensor, Sequence[SampleRow]], list[Sampled]]


class Model(Protocol):
    """What computes a batch; it knows the pool by itself."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits f32 (N, vocab) of the batch's logit rows."""
        ...


class Runner:
    """Stateless between steps. `sampler` (logits (N, vocab), rows) is replaceable to watch logits."""

    def __init__(self, model: Model, *, tokens_per_page: int, device: str = "cpu", sampler: Sampler = sample) -> None:
        self._model = model
        self._tokens_per_page = tokens_per_page
        self._device = device
        self._sampler = sampler

    def run(self, items: Sequence[Scheduled], *, merged: AdapterKey | None = None) -> list[tuple[Scheduled, Sampled]]:
        """Compute every item; the choice of the next token for those that sample. With `merged` the weights hold every delta."""
        if not items:
            return []
        assert merged is None or all(item.request.adapter == merged for item in items), "a merged step has another adapter's request"
        ordered = sorted(items, key=lambda item: item.request.slot)  # one segment an adapter
        batch = build_batch(
            [_row(item, merged=merged is not None) for item in ordered], tokens_per_page=self._tokens_per_page, device=self._device
        )
        logits = self._model.forward(batch)
        sampling = [item for item in ordered if item.samples]
        return list(zip(sampling, self._sampler(logits, [_sample_row(item) for item in sampling]), strict=True))


def _row(item: Scheduled, *, merged: bool) -> BatchRow:
    request = item.request
    slot = NO_SLOT if merged else request.slot
    return BatchRow(request.tokens(item.start, item.end), item.start, request.pages, slot=slot, wants_logits=item.samples)


def _sample_row(item: Scheduled) -> SampleRow:
    request = item.request
    return SampleRow(request.params, item.ticket.seed, request.num_tokens, request.prompt_ids, request.output_ids)
