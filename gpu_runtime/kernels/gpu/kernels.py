"""Launches: the Triton kernels of this folder behind the protocol of `backend.Kernels`. Base products go to cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton

from gpu_runtime.core import BF16, F16, F32
from gpu_runtime.kernels.backend import (
    AdapterTables,
    Decoder,
    DecoderSpec,
    HeadNorms,
    LayerWeights,
    LoraSites,
    PackedWeight,
    RopeTables,
)
from gpu_runtime.kernels.batch import ForwardBatch
from gpu_runtime.kernels.decoder import OpByOpDecoder
from gpu_runtime.kernels.gpu import attention, elementwise, expand, merge, rope_kv_write, shrink
from gpu_runtime.kernels.gpu.routing import CHUNK_TOKENS, Routing, routing_of

_CODE_OF = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


class GpuKernels:
    """See `backend.Kernels`. Activations have the dtype of the base model's weights; every sum is f32."""

    name = "gpu"
    activations: torch.dtype | None = None

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        return PackedWeight(weight, weight.shape[0])

    def decoder(
        self, spec: DecoderSpec, *, layers: Sequence[LayerWeights], kv: torch.Tensor, pool: torch.Tensor, tables: AdapterTables
    ) -> Decoder:
        return OpByOpDecoder(self, spec=spec, layers=layers, kv=kv, pool=pool, tables=tables)

    def linear(self, x: torch.Tensor, *, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight.data, None if bias is None else bias.to(x.dtype))

    def rms_norm(self, x: torch.Tensor, *, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.empty_like(x)
        block = triton.next_power_of_2(x.shape[1])
        elementwise.rms_norm[x.shape[0],](
            y, x, added if added is not None else x, weight, x.shape[1], eps, HAS_ADDED=added is not None, BLOCK_D=block
        )
        return y

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return _gated(gate_up, elementwise.silu_mul)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return _gated(gate_up, elementwise.gelu_mul)

    def lora_delta(
        self,
        y: torch.Tensor,
        *,
        x: torch.Tensor,
        pool: torch.Tensor,
        tables: AdapterTables,
        layer: int,
        sites: LoraSites,
        batch: ForwardBatch,
    ) -> None:
        """One launch of each stage for every dtype that a resident adapter is stored in; mostly that is one."""
        routing = routing_of(batch, block_m=attention.BLOCK_M)
        work = _Delta(y=y, x=x, pool=pool, tables=tables, layer=layer, sites=sites, slots=batch.slots, routing=routing)
        for code in tables.stored_codes:
            work.run(code)

    def merge(
        self,
        out: torch.Tensor,
        *,
        weight: PackedWeight,
        pool: torch.Tensor,
        tables: AdapterTables,
        slot: int,
        layer: int,
        sites: LoraSites,
    ) -> None:
        widest, num_columns = max(end - start for start, end in sites.spans), weight.data.shape[1]
        grid = (triton.cdiv(widest, merge.BLOCK_O), triton.cdiv(num_columns, merge.BLOCK_D), len(sites.targets))
        code = tables.code_of(slot)
        merge.merge[grid](
            out, weight.data, pool, tables.rows, tables.ranks, tables.scales, slot, layer, tables.rows.shape[1], tables.rows.shape[4],
            num_columns, FIRST_TARGET=sites.targets[0], **_span_constants(sites), CODE=code,
            PRECISION="ieee" if code == F32 else "tf32x3", BLOCK_R=16, BLOCK_O=merge.BLOCK_O, BLOCK_D=merge.BLOCK_D,
        )  # fmt: skip

    def rope_kv_write(
        self,
        qkv: torch.Tensor,
        *,
        num_heads: int,
        rope: RopeTables,
        kv: torch.Tensor,
        layer: int,
        batch: ForwardBatch,
        norms: HeadNorms | None = None,
    ) -> None:
        num_kv_heads, tokens_per_page, head_dim = kv.shape[3:]
        q_norm, k_norm, eps = (rope.cos, rope.cos, 0.0) if norms is None else (norms.q, norms.k, norms.eps)  # without: never read
        rope_kv_write.rope_kv_write[qkv.shape[0], num_heads + 2 * num_kv_heads](
            qkv, kv, rope.cos, rope.sin, batch.positions, batch.kv_slots, q_norm, k_norm, eps, num_heads, num_kv_heads, head_dim,
            tokens_per_page, *_strides(kv, layer), HAS_NORMS=norms is not None, BLOCK_H=triton.next_power_of_2(head_dim // 2),
            num_warps=rope_kv_write.NUM_WARPS,
        )  # fmt: skip

    def paged_attention(
        self, qkv: torch.Tensor, *, num_heads: int, kv: torch.Tensor, layer: int, batch: ForwardBatch, scale: float, window: int = 0
    ) -> torch.Tensor:
        out = qkv.new_empty((qkv.shape[0], num_heads * kv.shape[5]))
        work = _Attention(
            out, qkv, num_heads, kv, layer, batch, routing_of(batch, block_m=attention.BLOCK_M), scale, window
        )  # fmt: skip
        if work.routing.decode_requests.numel():
            work.decode()
        if work.routing.query_blocks.numel():
            work.prompt()
        return out


def _gated(gate_up: torch.Tensor, kernel: Any) -> torch.Tensor:
    width = gate_up.shape[1] // 2
    y = gate_up.new_empty((gate_up.shape[0], width))
    kernel[gate_up.shape[0], triton.cdiv(width, elementwise.BLOCK_F)](y, gate_up, width, BLOCK_F=elementwise.BLOCK_F)
    return y


class _Delta:
    """Shrink and expand of one group of sites for one batch."""

    def __init__(
        self,
        *,
        y: torch.Tensor,
        x: torch.Tensor,
        pool: torch.Tensor,
        tables: AdapterTables,
        layer: int,
        sites: LoraSites,
        slots: torch.Tensor,
        routing: Routing,
    ) -> None:
        assert sites.targets == tuple(range(sites.targets[0], sites.targets[0] + len(sites.targets))), (
            "targets of a group follow each other"
        )
        self.y, self.x, self.pool, self.tables, self.layer, self.slots, self.routing = y, x, pool, tables, layer, slots, routing
        self.first_target, self.num_targets = sites.targets[0], len(sites.targets)
        self.spans = _span_constants(sites)
        self.widest = max(end - start for start, end in sites.spans)
        self.num_layers, self.max_rank = tables.rows.shape[1], tables.rows.shape[4]
        self.block_r = min(64, max(16, triton.next_power_of_2(self.max_rank)))
        self.splits = shrink.num_splits(x.shape[1])
        self.t = torch.empty((x.shape[0], self.num_targets, self.splits, self.max_rank), dtype=torch.float32, device=x.device)

    def run(self, code: int) -> None:
        if self.routing.decode_tokens.numel():
            self._rows(code)
        if self.routing.chunks.numel():
            self._chunks(code)

    def _rows(self, code: int) -> None:
        tables, tokens = self.tables, self.routing.decode_tokens
        where = (self.layer, self.num_layers, self.max_rank)
        columns = self.x.shape[1]
        shrink.shrink_row[tokens.numel(), self.num_targets, self.splits](
            self.t, self.x, self.pool, tables.rows, tables.ranks, tables.dtypes, self.slots, tokens, *where, columns,
            shrink.columns_per_split(columns), FIRST_TARGET=self.first_target, CODE=code, BLOCK_R=16, BLOCK_K=shrink.BLOCK_K,
        )  # fmt: skip
        grid = (tokens.numel(), triton.cdiv(self.widest, expand.BLOCK_O), self.num_targets)
        expand.expand_row[grid](
            self.y, self.t, self.pool, tables.rows, tables.ranks, tables.scales, tables.dtypes, self.slots, tokens, *where,
            self.y.shape[1], self.splits, FIRST_TARGET=self.first_target, **self.spans, CODE=code, BLOCK_R=16, BLOCK_O=expand.BLOCK_O,
        )  # fmt: skip

    def _chunks(self, code: int) -> None:
        tables, chunks = self.tables, self.routing.chunks
        where = (self.layer, self.num_layers, self.max_rank)
        precision = "native" if _CODE_OF[self.x.dtype] == code and code != F32 else "ieee"
        shrink.shrink_chunk[chunks.shape[0], self.num_targets](
            self.t, self.x, self.pool, tables.rows, tables.ranks, tables.dtypes, chunks, *where, self.x.shape[1], self.splits,
            FIRST_TARGET=self.first_target, CODE=code, PRECISION=precision,
            BLOCK_M=CHUNK_TOKENS, BLOCK_R=self.block_r, BLOCK_K=shrink.CHUNK_K,
        )  # fmt: skip
        grid = (chunks.shape[0], triton.cdiv(self.widest, expand.CHUNK_O), self.num_targets)
        expand.expand_chunk[grid](
            self.y, self.t, self.pool, tables.rows, tables.ranks, tables.scales, tables.dtypes, chunks, *where,
            self.y.shape[1], self.splits, FIRST_TARGET=self.first_target, **self.spans, CODE=code,
            PRECISION="ieee" if code == F32 else "tf32x3", BLOCK_M=CHUNK_TOKENS, BLOCK_R=self.block_r, BLOCK_O=expand.CHUNK_O,
        )  # fmt: skip


def _span_constants(sites: LoraSites) -> dict[str, int]:
    """S0, E0, S1, ...: where each target's columns of y begin and end; a group has three targets at most."""
    padded = (*sites.spans, *[(0, 0)] * (3 - len(sites.spans)))
    return {name: value for which, (start, end) in enumerate(padded) for name, value in ((f"S{which}", start), (f"E{which}", end))}


def _strides(kv: torch.Tensor, layer: int) -> tuple[int, int, int, int]:
    """(page stride, offset of the layer, offset of V from K, head stride) of the KV view, in elements."""
    return kv.stride(0), layer * kv.stride(1), kv.stride(2), kv.stride(3)


@dataclass(frozen=True, eq=False)
class _Attention:
    """One layer's attention for one batch."""

    out: torch.Tensor
    qkv: torch.Tensor
    num_heads: int
    kv: torch.Tensor
    layer: int
    batch: ForwardBatch
    routing: Routing
    scale: float
    window: int

    @property
    def block_d(self) -> int:
        return max(16, int(triton.next_power_of_2(self.kv.shape[5])))

    @property
    def widening(self) -> int:
        """Heads wider than 128 need more warps, or their tiles spill."""
        return 2 if self.block_d > 128 else 1

    def decode(self) -> None:
        num_kv_heads, tokens_per_page, head_dim = self.kv.shape[3:]
        batch, requests = self.batch, self.routing.decode_requests
        group, num_splits = self.num_heads // num_kv_heads, triton.cdiv(batch.longest_context, attention.SPLIT_TOKENS)
        sums = (requests.numel(), num_kv_heads, num_splits, group)
        parts = torch.empty((*sums, head_dim), dtype=torch.float32, device=self.qkv.device)
        bests, totals = torch.empty((2, *sums), dtype=torch.float32, device=self.qkv.device)
        attention.attend_split[sums[:3]](
            parts, bests, totals, self.qkv, self.kv, batch.block_tables, batch.context_lens, batch.query_starts, requests,
            self.scale, batch.block_tables.stride(0), self.qkv.shape[1], *_strides(self.kv, self.layer), tokens_per_page, head_dim,
            group, self.window, SPLIT_TOKENS=attention.SPLIT_TOKENS, BLOCK_G=max(attention.MIN_GROUP, triton.next_power_of_2(group)),
            BLOCK_N=attention.BLOCK_N, BLOCK_D=self.block_d, PRECISION="ieee", num_warps=attention.SPLIT_WARPS * self.widening,
        )  # fmt: skip
        attention.join_splits[requests.numel(), self.num_heads](
            self.out, parts, bests, totals, batch.context_lens, batch.query_starts, requests, num_splits, head_dim, group, self.window,
            SPLIT_TOKENS=attention.SPLIT_TOKENS, BLOCK_D=self.block_d,
        )  # fmt: skip

    def prompt(self) -> None:
        num_kv_heads, tokens_per_page, head_dim = self.kv.shape[3:]
        batch, blocks = self.batch, self.routing.query_blocks
        attention.attend_prompt[blocks.shape[0], self.num_heads](
            self.out, self.qkv, self.kv, batch.block_tables, batch.context_lens, batch.query_starts, blocks,
            self.scale, batch.block_tables.stride(0), self.qkv.shape[1], *_strides(self.kv, self.layer), tokens_per_page, head_dim,
            self.num_heads // num_kv_heads, self.window, BLOCK_M=attention.BLOCK_M, BLOCK_N=attention.BLOCK_N,
            BLOCK_D=self.block_d, PRECISION="ieee", num_warps=attention.PROMPT_WARPS * self.widening,
        )  # fmt: skip
