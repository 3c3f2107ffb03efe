"""A poisoned pool with random adapters and KV in it, and the fp64 oracle of what the kernels make of them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch

from gpu_runtime.core import NO_SLOT, TARGETS
from gpu_runtime.kernels.backend import LoraSites
from gpu_runtime.kernels.batch import BatchRow, ForwardBatch, build_batch
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.plan import PART_A, Site, plan_adapter
from gpu_runtime.memory.tables import SlotTables

LAYER = 1
Pairs = dict[int, tuple[torch.Tensor, torch.Tensor, float]]  # target index -> A (r, in), B (out, r), scale


class Arena:
    """Adapters of one site group (targets that share x) in a pool whose free bytes are all 0xFF."""

    def __init__(self, *, in_features: int, out_features: Sequence[int], num_slots: int, max_rank: int = 64, pages: int = 512) -> None:
        self.in_features = in_features
        self.layout = PageLayout(num_layers=2, num_kv_heads=1, head_dim=32, tokens_per_page=64)
        self.pool = PagePool(num_pages=pages, page_bytes=self.layout.page_bytes, poison_freed=True)
        self.tables = SlotTables(num_slots=num_slots, num_layers=2, max_rank=max_rank)
        ends = [sum(out_features[: at + 1]) for at in range(len(out_features))]
        spans = tuple((end - width, end) for end, width in zip(ends, out_features, strict=True))
        self.sites = LoraSites(tuple(range(len(out_features))), spans)
        self.adapters: dict[int, Pairs] = {}

    def install(self, slot: int, *, ranks: Mapping[int, int], dtype: torch.dtype, seed: int, fill: float | None = None) -> None:
        """A random adapter with `ranks` by target index; `fill` replaces every weight."""
        generator = torch.Generator().manual_seed(seed)
        pairs: Pairs = {}
        for target, rank in ranks.items():
            start, end = self.sites.spans[target]
            a = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
            b = torch.randn(end - start, rank, generator=generator)
            if fill is not None:
                a, b = torch.full_like(a, fill), torch.full_like(b, fill)
            pairs[target] = (a.to(dtype), b.to(dtype), 0.5 + target)
        self._write(slot, pairs, dtype)

    def _write(self, slot: int, pairs: Pairs, dtype: torch.dtype) -> None:
        sites = [Site(LAYER, TARGETS[target], a.shape[0], a.shape[1], b.shape[0]) for target, (a, b, _) in pairs.items()]
        plan = plan_adapter(self.layout, sites, dtype.itemsize)
        pages = self.pool.allocate(plan.num_pages, owner=f"slot {slot}")
        random.Random(slot).shuffle(pages)
        for tile in plan.tiles:
            a, b, _ = pairs[TARGETS.index(tile.target)]
            matrix = a if tile.part == PART_A else b.T.clone(memory_format=torch.contiguous_format)
            for row in range(tile.num_rows):
                raw = matrix[tile.first_row + row].view(torch.uint8)
                start = tile.offset + row * tile.row_bytes
                self.pool.data[pages[tile.page], start : start + raw.numel()] = raw  # the padding stays 0xFF
        scales = [pairs[TARGETS.index(site.target)][2] for site in plan.sites]
        self.tables.install(slot, plan, pages, scales, dtype)
        self.adapters[slot] = pairs

    def oracle(self, y: torch.Tensor, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """The delta applied in fp64."""
        out = y.double().clone()
        for token, slot in enumerate(slots):
            for target, (a, b, scale) in self.adapters.get(slot, {}).items():
                start, end = self.sites.spans[target]
                out[token, start:end] += scale * (b.double() @ (a.double() @ x[token].double()))
        return out


def batch_of_slots(slots: Sequence[int]) -> ForwardBatch:
    """One decode token a slot entry; the KV side is of no concern."""
    return build_batch([BatchRow([0], 0, [0], slot) for slot in slots], tokens_per_page=16)


def batch_of_prompts(prompts: Sequence[tuple[int, int]]) -> ForwardBatch:
    """A request of `count` tokens for each (count, slot); the KV side is of no concern."""
    return build_batch([BatchRow([0] * count, 0, range(-(-count // 16)), slot) for count, slot in prompts], tokens_per_page=16)


def popularity(kind: str, *, num_tokens: int, num_slots: int) -> list[int]:
    """Which slot each token uses: how requests fall on adapters."""
    rng = random.Random(kind)
    if kind == "identical":
        return [0] * num_tokens
    if kind == "distinct":
        return [token % num_slots for token in range(num_tokens)]
    if kind == "uniform":
        return [rng.randrange(NO_SLOT, num_slots) for _ in range(num_tokens)]
    if kind == "zipf":
        weights = [1 / (rank + 1) ** 1.5 for rank in range(num_slots)]
        return sorted(rng.choices(range(num_slots), weights, k=num_tokens))
    assert kind == "skewed"
    return [0] * (num_tokens - 3) + [1 % num_slots, NO_SLOT, 2 % num_slots]
