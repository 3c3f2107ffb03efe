"""A decoder bound to its weights: embedding, layers over the paged pool, final norm, head. Every architecture runs through it.

The layers themselves are `kernels/decoder.py`, or a backend's compiled form of it; how a family's differ is a file beside
this one.
"""

from __future__ import annotations

import torch

from gpu_runtime.core import TARGETS
from gpu_runtime.kernels.backend import DecoderSpec, Kernels, LoraSites, RopeTables
from gpu_runtime.kernels.batch import ForwardBatch
from gpu_runtime.memory.layout import PageLayout, kv_view
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.tables import SlotTables
from gpu_runtime.models.spec import ModelSpec, RopeSpec
from gpu_runtime.models.weights import ModelWeights


class CausalLM:
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
        self._embedding_scale = _embedding_scale(spec, weights.embedding.dtype)
        self._final_norm = weights.final_norm
        self._head = kernels.pack(weights.head)
        limit = min(max_positions or spec.max_positions, spec.max_positions)
        ropes = tuple(_rope_tables(rope, head_dim=spec.head_dim, max_positions=limit, device=pool.data.device) for rope in spec.ropes)
        self.decoder = kernels.decoder(
            _decoder_spec(spec, ropes=ropes), layers=weights.layers, kv=kv_view(pool, layout), pool=pool.data, tables=tables
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits f32 (N, vocab) of `batch.logit_rows`: `hidden`, then `logits` of those."""
        return self.logits(self.hidden(batch)[batch.logit_rows])

    @torch.inference_mode()
    def hidden(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the batch, write its K and V into the pool; what the last layer gives for each token (T, D)."""
        x = self._embedding[batch.token_ids].to(self._kernels.activations or self._embedding.dtype)
        if self._embedding_scale != 1.0:
            x *= self._embedding_scale
        return self.decoder(x, batch=batch)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits f32 (N, vocab) of rows (N, D) of `hidden`."""
        h = self._kernels.rms_norm(hidden, weight=self._final_norm, eps=self.spec.rms_norm_eps)
        return self._kernels.linear(h, weight=self._head).float()


def _embedding_scale(spec: ModelSpec, dtype: torch.dtype) -> float:
    """As the weights' dtype holds it: that is what the model was trained with."""
    return float(torch.tensor(spec.hidden_size**0.5).to(dtype)) if spec.architecture.scaled_embedding else 1.0


def _decoder_spec(spec: ModelSpec, *, ropes: tuple[RopeTables, ...]) -> DecoderSpec:
    return DecoderSpec(
        num_heads=spec.num_heads,
        eps=spec.rms_norm_eps,
        ropes=ropes,
        attention=spec.attention,
        scale=spec.score_scale,
        activation=spec.architecture.activation,
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


def _rope_tables(rope: RopeSpec, *, head_dim: int, max_positions: int, device: torch.device) -> RopeTables:
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, rope.frequencies(head_dim))
    return RopeTables(angles.cos().to(device), angles.sin().to(device))
