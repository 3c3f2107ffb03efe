"""Owns the slot tables: where in the pool each resident adapter's rank rows lie. Kernels read nothing else of an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gpu_runtime.core import BF16, F16, F32, TARGETS
from gpu_runtime.memory.pages import PAGE_ALIGNMENT
from gpu_runtime.memory.plan import AdapterPlan

DTYPE_CODES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


class SlotTables:
    """Small tensors indexed by slot; a slot without an adapter has rank 0 at every site.

    rows    int32 (S, L, 7, 2, max_rank)  start of a rank row in 16-byte units from the pool's start, -1 absent
    ranks   int32 (S, L, 7)               true rank, 0 where the adapter leaves the site alone
    scales  float32 (S, L, 7)             factor of B @ A, applied in fp32 to the rank vector
    dtypes  int32 (S,)                    0 f32, 1 f16, 2 bf16: how the rows are stored
    """

    def __init__(self, *, num_slots: int, num_layers: int, max_rank: int, device: str = "cpu") -> None:
        if min(num_slots, num_layers, max_rank) < 1:
            raise ValueError(f"num_slots, num_layers and max_rank are {num_slots}, {num_layers}, {max_rank}; each must be at least 1")
        self.num_slots = num_slots
        self.max_rank = max_rank
        sites = (num_slots, num_layers, len(TARGETS))
        self.rows = torch.full((*sites, 2, max_rank), -1, dtype=torch.int32, device=device)
        self.ranks = torch.zeros(sites, dtype=torch.int32, device=device)
        self.scales = torch.zeros(sites, dtype=torch.float32, device=device)
        self.dtypes = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._codes: dict[int, int] = {}

    def install(self, slot: int, plan: AdapterPlan, pages: Sequence[int], scales: Sequence[float], dtype: torch.dtype) -> None:
        """Point `slot` at an adapter that lies in `pages`; `scales` has one factor for each of `plan.sites`, in that order.

        Raises ValueError for a rank above max_rank or a dtype that kernels cannot read.
        """
        assert len(pages) == plan.num_pages, f"the plan has {plan.num_pages} pages, {len(pages)} were given"
        assert len(scales) == len(plan.sites), f"the plan has {len(plan.sites)} sites, {len(scales)} scales were given"
        if dtype not in DTYPE_CODES:
            raise ValueError(f"dtype is {dtype}; the kernels read float32, float16 and bfloat16")
        widest = max((site.rank for site in plan.sites), default=0)
        if widest > self.max_rank:
            raise ValueError(f"rank is {widest}; this runtime was started with max_rank {self.max_rank}")
        self.clear(slot)
        rows, ranks, factors = self._staged(plan, pages, scales)
        self.rows[slot], self.scales[slot], self.dtypes[slot] = rows, factors, DTYPE_CODES[dtype]
        self._codes[slot] = DTYPE_CODES[dtype]
        self.ranks[slot] = ranks  # last: a rank makes the rows visible

    def move(self, slot: int, moved: Mapping[int, int], *, page_bytes: int) -> None:
        """The pages of `slot`'s adapter were copied, old page -> new page: its rows follow."""
        units = page_bytes // PAGE_ALIGNMENT
        rows = self.rows[slot].cpu()
        pages = torch.div(rows, units, rounding_mode="floor")
        for old, new in moved.items():
            rows[pages == old] += (new - old) * units
        self.rows[slot] = rows

    def clear(self, slot: int) -> None:
        """Make `slot` empty."""
        assert 0 <= slot < self.num_slots, f"slot {slot} is not one of {self.num_slots}"
        self.ranks[slot] = 0
        self.rows[slot] = -1
        self.scales[slot] = 0
        self._codes.pop(slot, None)

    @property
    def stored_codes(self) -> tuple[int, ...]:
        """The dtypes that installed adapters are stored in, without asking the device."""
        return tuple(sorted(set(self._codes.values())))

    def code_of(self, slot: int) -> int:
        """The dtype that the adapter in `slot` is stored in, without asking the device."""
        return self._codes[slot]

    def _staged(self, plan: AdapterPlan, pages: Sequence[int], scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at, units = plan.row_places, plan.page_bytes // PAGE_ALIGNMENT
        rows = np.full(self.rows.shape[1:], -1, dtype=np.int32)
        rows[at.layer, at.target, at.part, at.row] = np.asarray(pages, np.int64)[at.page] * units + at.unit
        ranks, factors = np.zeros(self.ranks.shape[1:], np.int32), np.zeros(self.scales.shape[1:], np.float32)
        for site, scale in zip(plan.sites, scales, strict=True):
            ranks[site.layer, TARGETS.index(site.target)] = site.rank
            factors[site.layer, TARGETS.index(site.target)] = scale
        return torch.from_numpy(rows), torch.from_numpy(ranks), torch.from_numpy(factors)

    def check_integrity(self) -> None:
        """Within its rank every site has a row address, beyond it none."""
        present = self.rows >= 0
        within = torch.arange(self.max_rank, device=self.rows.device) < self.ranks[..., None]
        assert bool((present == within[..., None, :]).all()), "row addresses and ranks disagree"
