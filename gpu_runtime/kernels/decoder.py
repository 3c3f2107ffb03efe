"""A stack of decoder layers as a composition of ops: what every backend computes, and how one without its own stack does.

    h = norm(x);  x += O(attend(QKV(h)));  h = norm(x);  x += DOWN(silu(gate) * up of GATE_UP(h))

where each capital is a base matrix plus the LoRA delta of each token's slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_runtime.kernels.backend import AdapterTables, DecoderSpec, Kernels, LayerWeights, LoraSites, PackedWeight
from gpu_runtime.kernels.batch import ForwardBatch


@dataclass(frozen=True, eq=False)
class _PackedLayer:
    attention_norm: torch.Tensor
    qkv: PackedWeight
    o: PackedWeight
    mlp_norm: torch.Tensor
    gate_up: PackedWeight
    down: PackedWeight


class OpByOpDecoder:
    """See `backend.Decoder`. One call of `kernels` an op."""

    def __init__(
        self,
        kernels: Kernels,
        *,
        spec: DecoderSpec,
        layers: Sequence[LayerWeights],
        kv: torch.Tensor,
        pool: torch.Tensor,
        tables: AdapterTables,
    ) -> None:
        self._kernels = kernels
        self._spec = spec
        self._layers = [_packed(layer, kernels) for layer in layers]
        self._kv = kv
        self._pool = pool
        self._tables = tables

    def __call__(self, x: torch.Tensor, *, batch: ForwardBatch) -> torch.Tensor:
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            h = self._kernels.rms_norm(x, weight=layer.attention_norm, eps=self._spec.eps, added=delta)
            delta = self._attention(h, layer=layer, index=index, batch=batch)
            h = self._kernels.rms_norm(x, weight=layer.mlp_norm, eps=self._spec.eps, added=delta)
            delta = self._mlp(h, layer=layer, index=index, batch=batch)
        return x if delta is None else x + delta

    def _attention(self, h: torch.Tensor, *, layer: _PackedLayer, index: int, batch: ForwardBatch) -> torch.Tensor:
        spec = self._spec
        qkv = self._adapted(h, weight=layer.qkv, sites=spec.qkv, index=index, batch=batch)
        self._kernels.rope_kv_write(qkv, num_heads=spec.num_heads, rope=spec.rope, kv=self._kv, layer=index, batch=batch)
        attended = self._kernels.paged_attention(qkv, num_heads=spec.num_heads, kv=self._kv, layer=index, batch=batch)
        return self._adapted(attended, weight=layer.o, sites=spec.o, index=index, batch=batch)

    def _mlp(self, h: torch.Tensor, *, layer: _PackedLayer, index: int, batch: ForwardBatch) -> torch.Tensor:
        gate_up = self._adapted(h, weight=layer.gate_up, sites=self._spec.gate_up, index=index, batch=batch)
        inner = self._kernels.silu_mul(gate_up)
        return self._adapted(inner, weight=layer.down, sites=self._spec.down, index=index, batch=batch)

    def _adapted(self, x: torch.Tensor, *, weight: PackedWeight, sites: LoraSites, index: int, batch: ForwardBatch) -> torch.Tensor:
        """The base linear plus each token's delta."""
        y = self._kernels.linear(x, weight=weight)
        self._kernels.lora_delta(y, x=x, pool=self._pool, tables=self._tables, layer=index, sites=sites, batch=batch)
        return y


def _packed(layer: LayerWeights, kernels: Kernels) -> _PackedLayer:
    return _PackedLayer(
        attention_norm=layer.attention_norm,
        qkv=kernels.pack(layer.qkv),
        o=kernels.pack(layer.o),
        mlp_norm=layer.mlp_norm,
        gate_up=kernels.pack(layer.gate_up),
        down=kernels.pack(layer.down),
    )
