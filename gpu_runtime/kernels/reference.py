"""Plain torch, any device: the specification of every op and the oracle that other backends are tested against.

Written to be read, not to be fast: one request, one segment, one target at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from gpu_runtime.core import NO_SLOT
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
from gpu_runtime.kernels.rows import read_factors


class ReferenceKernels:
    """See `backend.Kernels` for the semantics of each op."""

    name = "reference"
    activations: torch.dtype | None = torch.float32

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        return PackedWeight(weight.float(), weight.shape[0])

    def decoder(
        self, spec: DecoderSpec, *, layers: Sequence[LayerWeights], kv: torch.Tensor, pool: torch.Tensor, tables: AdapterTables
    ) -> Decoder:
        return OpByOpDecoder(self, spec=spec, layers=layers, kv=kv, pool=pool, tables=tables)

    def linear(self, x: torch.Tensor, *, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight.data, bias)

    def rms_norm(self, x: torch.Tensor, *, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None) -> torch.Tensor:
        if added is not None:
            x += added
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

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
        for start, end, slot in batch.segments:
            if slot == NO_SLOT:
                continue
            for one in read_factors(pool, tables=tables, slot=slot, layer=layer, sites=sites, depth=x.shape[1]):
                y[start:end, one.start : one.end] += (x[start:end] @ one.a.T) @ one.b

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
        merged = weight.data.float().clone()
        for one in read_factors(pool, tables=tables, slot=slot, layer=layer, sites=sites, depth=merged.shape[1]):
            merged[one.start : one.end] += one.b.T @ one.a
        out.copy_(merged)

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
        num_tokens = qkv.shape[0]
        kv_heads, tokens_per_page, head_dim = kv.shape[3:]
        heads = qkv.view(num_tokens, -1, head_dim)
        rotated = heads[:, : num_heads + kv_heads]
        if norms is not None:
            weights = torch.cat((norms.q.expand(num_heads, -1), norms.k.expand(kv_heads, -1)))
            rotated.copy_(self.rms_norm(rotated, weight=weights, eps=norms.eps))
        cos, sin = rope.cos[batch.positions, None], rope.sin[batch.positions, None]
        low, high = rotated[..., : head_dim // 2], rotated[..., head_dim // 2 :]
        rotated.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
        pages, offsets = batch.kv_slots // tokens_per_page, batch.kv_slots % tokens_per_page
        kv[pages, layer, 0, :, offsets] = heads[:, num_heads : num_heads + kv_heads].to(kv.dtype)
        kv[pages, layer, 1, :, offsets] = heads[:, num_heads + kv_heads :].to(kv.dtype)

    def paged_attention(
        self, qkv: torch.Tensor, *, num_heads: int, kv: torch.Tensor, layer: int, batch: ForwardBatch, scale: float, window: int = 0
    ) -> torch.Tensor:
        head_dim = kv.shape[5]
        out = torch.empty((qkv.shape[0], num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
        for request in range(batch.num_requests):
            start, end = int(batch.query_starts[request]), int(batch.query_starts[request + 1])
            keys, values = read_context(kv, layer=layer, table=batch.block_tables[request], length=int(batch.context_lens[request]))
            queries = qkv[start:end, : num_heads * head_dim].view(end - start, num_heads, head_dim)
            seen = _seen(batch.positions[start:end], num_keys=keys.shape[0], window=window)
            out[start:end] = _attend(queries, keys.to(qkv.dtype), values.to(qkv.dtype), seen=seen, scale=scale)
        return out


def read_context(kv: torch.Tensor, *, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one request's first `length` tokens, each (length, kv_heads, head_dim)."""
    tokens_per_page = kv.shape[4]
    pages = table[: -(-length // tokens_per_page)].long()
    blocks = kv[pages, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return blocks[0], blocks[1]


def _seen(positions: torch.Tensor, *, num_keys: int, window: int) -> torch.Tensor:
    """bool (Q, C): the keys that a query at its position sees."""
    back = positions[:, None] - torch.arange(num_keys, device=positions.device)
    return (back >= 0) & (back < window) if window else back >= 0


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """GQA of queries (Q, H, D) over the `seen` ones of keys and values (C, KV, D); result (Q, H * D)."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,chd->hqc", queries, keys) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqc,chd->qhd", weights, values).flatten(1)
