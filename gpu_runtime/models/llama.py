"""The Llama family: RMSNorm, rotary GQA over the paged pool, gated MLP, a LoRA delta on every linear that has one.

The layers themselves are `kernels/decoder.py`, or a backend's compiled form of it; here a model is bound to its weights.
"""

from __future__ import annotations

import torch

from gpu_runtime.core import TARGETS
from gpu_runtime.kernels.backend import DecoderSpec, Kernels, LoraSites, RopeTables
from gpu_runtime.kernels.batch import ForwardBatch
from gpu_runtime.memory.layout import PageLayout, kv_view
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.models.spec import ModelSpec
from gpu_runtime.models.weights import ModelWeights


class Llama:
    """A model bound to a backend and to the pool that holds its KV and its adapters.

    `weights` are packed into the backend's order: the caller should let go of them afterwards. `max_positions` bounds the
    rotary tables; it is the model's own limit unless the runtime serves less.
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
        self._kernels = kernels
        self._embedding = weights.embedding
        self._final_norm = weights.final_norm
        self._head = kernels.pack(weights.head)
        limit = min(max_positions or spec.max_positions, spec.max_positions)
        decoder_spec = _decoder_spec(spec, rope=_rope_tables(spec, limit, device=pool.data.device))
        self.decoder = kernels.decoder(decoder_spec, layers=weights.layers, kv=kv_view(pool, layout), pool=pool.data, tables=tables)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the batch, write its K and V into the pool; logits f32 (N, vocab) of `batch.logit_rows`."""
        x = self._embedding[batch.token_ids].to(self._kernels.activations or self._embedding.dtype)
        x = self.decoder(x, batch=batch)[batch.logit_rows]
        h = self._kernels.rms_norm(x, weight=self._final_norm, eps=self.spec.rms_norm_eps)
        return self._kernels.linear(h, weight=self._head).float()


def _decoder_spec(spec: ModelSpec, *, rope: RopeTables) -> DecoderSpec:
    return DecoderSpec(
        num_heads=spec.num_heads,
        eps=spec.rms_norm_eps,
        rope=rope,
        qkv=_sites(spec, "q_proj", "k_proj", "v_proj"),
        o=_sites(spec, "o_proj"),
        gate_up=_sites(spec, "gate_proj", "up_proj"),
        down=_sites(spec, "down_proj"),
    )


def _sites(spec: ModelSpec, *names: str) -> LoraSites:
    spans, start = [], 0
    for name in names:
        end = start + spec.target_shape(name)[1]
        spans.append((start, end))
        start = end
    return LoraSites(tuple(TARGETS.index(name) for name in names), tuple(spans))


def _rope_tables(spec: ModelSpec, max_positions: int, *, device: torch.device) -> RopeTables:
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, spec.rope.frequencies(spec.head_dim))
    return RopeTables(angles.cos().to(device), angles.sin().to(device))
