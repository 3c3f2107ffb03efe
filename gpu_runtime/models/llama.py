"""The Llama family: RMSNorm, rotary GQA over the paged pool, gated MLP, a LoRA delta on every linear that has one."""

from __future__ import annotations

import torch

from gpu_runtime.core import TARGETS
from gpu_runtime.kernels.backend import Kernels, LoraGroup, RopeTables
from gpu_runtime.kernels.batch import ForwardBatch
from gpu_runtime.memory.layout import PageLayout, kv_view
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.models.spec import ModelSpec
from gpu_runtime.models.weights import LayerWeights, ModelWeights

Names = tuple[str, ...]
QKV: Names = ("q_proj", "k_proj", "v_proj")
O_PROJ: Names = ("o_proj",)
GATE_UP: Names = ("gate_proj", "up_proj")
DOWN: Names = ("down_proj",)


class Llama:
    """A model bound to its weights, a backend, and the pool that holds its KV and its adapters.

    `max_positions` bounds the rotary tables; it is the model's own limit unless the runtime serves less.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        weights: ModelWeights,
        kernels: Kernels,
        pool: PagePool,
        layout: PageLayout,
        tables: SlotTables,
        max_positions: int | None = None,
    ) -> None:
        self.spec = spec
        self._weights = weights
        self._kernels = kernels
        self._pool = pool.data
        self._kv = kv_view(pool, layout)
        self._tables = tables
        self._rope = _rope_tables(spec, min(max_positions or spec.max_positions, spec.max_positions), device=pool.data.device)
        self._groups = {names: _group_spans(spec, names) for names in (QKV, O_PROJ, GATE_UP, DOWN)}

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the batch, write its K and V into the pool; logits f32 (N, vocab) of `batch.logit_rows`."""
        x = self._weights.embedding[batch.token_ids].float()
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            h = self._kernels.rms_norm(x, weight=layer.attention_norm, eps=self.spec.rms_norm_eps, added=delta)
            delta = self._attention(h, layer, index, batch)
            h = self._kernels.rms_norm(x, weight=layer.mlp_norm, eps=self.spec.rms_norm_eps, added=delta)
            delta = self._mlp(h, layer, index, batch)
        assert delta is not None, "a model has at least one layer"
        wanted, last = x[batch.logit_rows], delta[batch.logit_rows]
        h = self._kernels.rms_norm(wanted, weight=self._weights.final_norm, eps=self.spec.rms_norm_eps, added=last)
        return self._kernels.linear(h, weight=self._weights.head).float()

    def _attention(self, h: torch.Tensor, layer: LayerWeights, index: int, batch: ForwardBatch) -> torch.Tensor:
        num_heads = self.spec.num_heads
        qkv = self._linear(h, layer.qkv, QKV, index, batch)
        self._kernels.rope_kv_write(qkv, num_heads=num_heads, rope=self._rope, kv=self._kv, layer=index, batch=batch)
        attended = self._kernels.paged_attention(qkv, num_heads=num_heads, kv=self._kv, layer=index, batch=batch)
        return self._linear(attended, layer.o, O_PROJ, index, batch)

    def _mlp(self, h: torch.Tensor, layer: LayerWeights, index: int, batch: ForwardBatch) -> torch.Tensor:
        gate_up = self._linear(h, layer.gate_up, GATE_UP, index, batch)
        return self._linear(self._kernels.silu_mul(gate_up), layer.down, DOWN, index, batch)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, names: Names, index: int, batch: ForwardBatch) -> torch.Tensor:
        """x @ weight.T plus each token's adapter delta on the targets `names`."""
        y = self._kernels.linear(x, weight=weight)
        if batch.has_adapters:
            targets, spans = self._groups[names]
            group = LoraGroup(index, targets, spans)
            self._kernels.lora_delta(y, x=x, pool=self._pool, tables=self._tables, group=group, batch=batch)
        return y


def _group_spans(spec: ModelSpec, names: Names) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    spans, start = [], 0
    for name in names:
        end = start + spec.target_shape(name)[1]
        spans.append((start, end))
        start = end
    return tuple(TARGETS.index(name) for name in names), tuple(spans)


def _rope_tables(spec: ModelSpec, max_positions: int, *, device: torch.device) -> RopeTables:
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, spec.rope.frequencies(spec.head_dim))
    return RopeTables(angles.cos().to(device), angles.sin().to(device))
