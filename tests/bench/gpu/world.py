"""One adapted group of linears on a device: many random adapters in a page pool, and the rivals' ways to keep the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpu_runtime.core import TARGETS
from gpu_runtime.kernels.backend import Kernels, LoraSites
from gpu_runtime.kernels.batch import BatchRow, ForwardBatch, build_batch
from gpu_runtime.kernels.rows import read_factors
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.plan import Site, plan_adapter
from gpu_runtime.memory.tables import SlotTables

TOKENS_PER_PAGE = 16


class World:
    """`num_adapters` of one `rank` on one linear (in_features -> out_features), stored in bf16; `dtype` of activations and base weights.

    Triton's interpreter multiplies the bits of bf16 operands as they are, so on a CPU activations are f32.
    """

    def __init__(
        self, *, in_features: int, out_features: int, num_adapters: int, rank: int, device: str, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.device, self.dtype, self.in_features, self.out_features = device, dtype, in_features, out_features
        self.layout = PageLayout(num_layers=1, num_kv_heads=8, head_dim=128, tokens_per_page=TOKENS_PER_PAGE)
        self.plan = plan_adapter(self.layout, [Site(0, TARGETS[0], rank, in_features, out_features)], 2)
        self.pool = PagePool(num_pages=num_adapters * self.plan.num_pages, page_bytes=self.layout.page_bytes, device=device)
        self.tables = SlotTables(num_slots=num_adapters, num_layers=1, max_rank=rank, device=device)
        self.sites = LoraSites((0,), ((0, out_features),))
        generator = torch.Generator(device).manual_seed(0)
        for slot in range(num_adapters):
            pages = self.pool.allocate(self.plan.num_pages, owner=f"slot {slot}")
            for page in pages:
                values = torch.randn(self.layout.page_bytes // 2, generator=generator, device=device) / math.sqrt(in_features)
                self.pool.data[page] = values.to(torch.bfloat16).view(torch.uint8)
            self.tables.install(slot, self.plan, pages, [1.0], torch.bfloat16)

    def batch(self, lengths: Sequence[tuple[int, int]]) -> ForwardBatch:
        """A request of so many tokens for each (number, slot)."""
        rows = [BatchRow([0] * count, 0, range(-(-count // TOKENS_PER_PAGE)), slot) for count, slot in lengths]
        return build_batch(rows, tokens_per_page=TOKENS_PER_PAGE, device=self.device)

    def inputs(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """y and x, the same every time."""
        generator = torch.Generator(self.device).manual_seed(1)
        widths = self.out_features, self.in_features
        y, x = (torch.randn(num_tokens, width, generator=generator, device=self.device).to(self.dtype) for width in widths)
        return y, x

    def ours(self, kernels: Kernels, y: torch.Tensor, x: torch.Tensor, batch: ForwardBatch) -> None:
        kernels.lora_delta(y, x=x, pool=self.pool.data, tables=self.tables, layer=0, sites=self.sites, batch=batch)

    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n, rank, in) and B (n, rank, out) in `dtype`, as padded engines keep them."""
        pairs = [self._factors(slot) for slot in range(self.tables.num_slots)]
        a, b = (torch.stack(parts).to(self.dtype) for parts in zip(*pairs, strict=True))
        return a, b

    def oracle(self, y: torch.Tensor, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """In fp64 from the bytes of the pool."""
        out = y.double()
        for start, end, slot in batch.segments:
            if slot >= 0:
                a, b = self._factors(slot)
                out[start:end] += (x[start:end].double() @ a.double().T) @ b.double()
        return out

    def _factors(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        [one] = read_factors(self.pool.data, tables=self.tables, slot=slot, layer=0, sites=self.sites, depth=self.in_features)
        return one.a, one.b

    def bound(self, expected: torch.Tensor) -> torch.Tensor:
        """What rounding allows: of a 16-bit result once, of f32 sums at most once a term."""
        if self.dtype is torch.float32:
            return 2.0**-24 * (self.in_features + self.tables.max_rank) * (1 + expected.abs())
        return 2.0**-8 * (1 + expected.abs())

    @property
    def adapter_bytes(self) -> int:
        return self.plan.weight_bytes


def padded_bmm(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor) -> None:
    """S-LoRA's --bmm: gather both matrices of each row, then two batched products."""
    y += torch.bmm(torch.bmm(x[:, None], a[slots].transpose(1, 2)), b[slots])[:, 0]


def one_hot_einsum(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, one_hot: torch.Tensor) -> None:
    """dLoRA's one einsum over every resident adapter (its layers.py); one_hot (tokens, n)."""
    y += torch.einsum("bk,bi,irk,ird->bd", x, one_hot, a, b)
