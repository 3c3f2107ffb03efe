"""Owns reading rank rows out of the pool as whole matrices, by plain torch: for the oracle and for merging, not for steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpu_runtime.kernels.backend import AdapterTables, LoraSites

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # by the codes of core.py
UNIT_BYTES = 16  # slot tables count in these


@dataclass(frozen=True, eq=False)
class Factors:
    """One target's matrices in f32: the delta of rows [start, end) of the base matrix is b.T @ a; a (r, D) holds the scale."""

    start: int
    end: int
    a: torch.Tensor
    b: torch.Tensor


def read_rows(pool: torch.Tensor, *, rows: torch.Tensor, num_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Rank rows as f32 (rank, num_features); `rows` are their starts in 16-byte units."""
    starts = rows.long() * (UNIT_BYTES // dtype.itemsize)
    columns = torch.arange(num_features, device=rows.device)
    return pool.view(-1).view(dtype)[starts[:, None] + columns].float()


def read_factors(pool: torch.Tensor, *, tables: AdapterTables, slot: int, layer: int, sites: LoraSites, depth: int) -> Iterator[Factors]:
    """Of every target that the slot's adapter touches at `layer`; `depth` is the length of a row of A."""
    for target, (start, end) in zip(sites.targets, sites.spans, strict=True):
        rank = int(tables.ranks[slot, layer, target])
        if rank:
            dtype = STORED_DTYPES[tables.code_of(slot)]
            rows = tables.rows[slot, layer, target, :, :rank]
            a = read_rows(pool, rows=rows[0], num_features=depth, dtype=dtype) * tables.scales[slot, layer, target]
            yield Factors(start, end, a, read_rows(pool, rows=rows[1], num_features=end - start, dtype=dtype))
