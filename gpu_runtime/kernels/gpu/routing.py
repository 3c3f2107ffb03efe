"""Which rows of a batch go through which kernel, made once a step and shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from gpu_runtime.core import NO_SLOT
from gpu_runtime.kernels.batch import ForwardBatch

CHUNK_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Routing:
    """Work lists on the batch's device, without entries for nothing: every program of a grid has work.

    decode_tokens    int32 (N)     tokens of requests with one query and an adapter
    chunks           int32 (C, 3)  (first token, count, slot): prompt tokens side by side that share an adapter
    decode_requests  int32 (R)     requests with one query
    query_blocks     int32 (B, 2)  (request, index of the block's first query) of the others
    """

    decode_tokens: torch.Tensor
    chunks: torch.Tensor
    decode_requests: torch.Tensor
    query_blocks: torch.Tensor


_made: WeakKeyDictionary[ForwardBatch, Routing] = WeakKeyDictionary()


def routing_of(batch: ForwardBatch, *, block_m: int) -> Routing:
    """The batch's routing; whether a request decodes is a fact about itself, so no neighbour changes a row's kernel."""
    found = _made.get(batch)
    if found is None:
        found = _made[batch] = _route(batch, block_m=block_m)
    return found


def _route(batch: ForwardBatch, *, block_m: int) -> Routing:
    decode_tokens: list[int] = []
    decode_requests: list[int] = []
    runs: list[tuple[int, int, int]] = []
    query_blocks: list[tuple[int, int]] = []
    start = 0
    for request, (count, slot) in enumerate(zip(batch.query_lens, batch.request_slots, strict=True)):
        if count == 1:
            decode_requests.append(request)
            decode_tokens += [start] if slot != NO_SLOT else []
        else:
            query_blocks += [(request, first) for first in range(0, count, block_m)]
            _extend(runs, start, count, slot)
        start += count

    def tensor(values: Sequence[int] | Sequence[tuple[int, ...]], width: int = 0) -> torch.Tensor:
        made = torch.tensor(values, dtype=torch.int32)
        return (made.reshape(-1, width) if width else made).to(batch.slots.device, non_blocking=True)

    return Routing(
        decode_tokens=tensor(decode_tokens),
        chunks=tensor([chunk for run in runs for chunk in _chunks(*run)], width=3),
        decode_requests=tensor(decode_requests),
        query_blocks=tensor(query_blocks, width=2),
    )


def _extend(runs: list[tuple[int, int, int]], start: int, count: int, slot: int) -> None:
    """Prompts of one adapter that stand side by side make one run, so that short ones share a chunk."""
    if slot == NO_SLOT:
        return
    if runs and runs[-1][2] == slot and runs[-1][0] + runs[-1][1] == start:
        runs[-1] = (runs[-1][0], runs[-1][1] + count, slot)
    else:
        runs.append((start, count, slot))


def _chunks(start: int, count: int, slot: int) -> list[tuple[int, int, int]]:
    return [(first, min(CHUNK_TOKENS, start + count - first), slot) for first in range(start, start + count, CHUNK_TOKENS)]
