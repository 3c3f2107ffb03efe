"""Owns the tensors that describe one step's batch, and how they are built from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from gpu_runtime.core import NO_SLOT, Segment


@dataclass(frozen=True)
class BatchRow:
    """One request's share of a step.

    token_ids       the tokens to compute now (a prompt chunk, or one token in decode)
    first_position  position of the first of them; everything before it is in the pool already
    pages           the request's KV pages in token order, at least enough for its last token
    slot            adapter slot, NO_SLOT for the base model alone
    wants_logits    whether the last token's logits are needed
    """

    token_ids: Sequence[int]
    first_position: int
    pages: Sequence[int]
    slot: int = NO_SLOT
    wants_logits: bool = True


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """T tokens of R requests; the tokens of a request are consecutive and in order.

    token_ids     int64 (T)
    positions     int64 (T)
    query_starts  int32 (R+1)   tokens [query_starts[r], query_starts[r+1]) belong to request r
    context_lens  int32 (R)     tokens of request r including this step's
    block_tables  int32 (R, M)  KV pages in token order, padded with -1
    kv_slots      int64 (T)     page * tokens_per_page + offset: where a token's K and V go
    slots         int32 (T)     adapter slot of each token, -1 = base
    segments      runs of tokens that share a slot; together they cover [0, T)
    logit_rows    int64 (N)     tokens whose logits are wanted

    Known to the host, so that a launch never waits for the device to say:
    query_lens, request_slots   tokens of this step and adapter slot of each request
    longest_context             the largest of context_lens
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    kv_slots: torch.Tensor
    slots: torch.Tensor
    segments: tuple[Segment, ...]
    logit_rows: torch.Tensor
    query_lens: tuple[int, ...]
    request_slots: tuple[int, ...]
    longest_context: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_requests(self) -> int:
        return self.context_lens.shape[0]

    @property
    def has_adapters(self) -> bool:
        return any(segment.slot != NO_SLOT for segment in self.segments)


def build_batch(rows: Sequence[BatchRow], *, tokens_per_page: int, device: str = "cpu") -> ForwardBatch:
    """The batch of `rows`, in their order. Rows of one slot that stand side by side share a segment."""
    assert rows, "a step needs at least one row"
    positions: list[int] = []
    kv_slots: list[int] = []
    slots: list[int] = []
    for row in rows:
        span = range(row.first_position, row.first_position + len(row.token_ids))
        assert len(span) > 0, "a row needs at least one token"
        assert len(row.pages) * tokens_per_page >= span.stop, f"{len(row.pages)} pages do not hold {span.stop} tokens"
        positions.extend(span)
        kv_slots.extend(row.pages[at // tokens_per_page] * tokens_per_page + at % tokens_per_page for at in span)
        slots.extend([row.slot] * len(span))
    starts = [0, *accumulate(len(row.token_ids) for row in rows)]

    def tensor(values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return ForwardBatch(
        token_ids=tensor([token for row in rows for token in row.token_ids], torch.int64),
        positions=tensor(positions, torch.int64),
        query_starts=tensor(starts, torch.int32),
        context_lens=tensor([row.first_position + len(row.token_ids) for row in rows], torch.int32),
        block_tables=_block_tables(rows, device),
        kv_slots=tensor(kv_slots, torch.int64),
        slots=tensor(slots, torch.int32),
        segments=_segments(slots),
        logit_rows=tensor([end - 1 for end, row in zip(starts[1:], rows, strict=True) if row.wants_logits], torch.int64),
        query_lens=tuple(len(row.token_ids) for row in rows),
        request_slots=tuple(row.slot for row in rows),
        longest_context=max(row.first_position + len(row.token_ids) for row in rows),
    )


def _block_tables(rows: Sequence[BatchRow], device: str) -> torch.Tensor:
    width = max(len(row.pages) for row in rows)
    return torch.tensor([[*row.pages, *[-1] * (width - len(row.pages))] for row in rows], dtype=torch.int32, device=device)


def _segments(slots: Sequence[int]) -> tuple[Segment, ...]:
    """[3, 3, -1, 3] -> (0, 2, 3), (2, 3, -1), (3, 4, 3)."""
    borders = [0, *(at for at in range(1, len(slots)) if slots[at] != slots[at - 1]), len(slots)]
    return tuple(Segment(start, end, slots[start]) for start, end in pairwise(borders))
