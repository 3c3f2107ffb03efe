"""A stack of decoder layers as a composition of ops: what every backend computes, and how one without its own stack does.

    h = norm(x);  x += O(attend(QKV(h)));  h = norm(x);  x += DOWN(act(gate) * up of GATE_UP(h))

where each capital is a base matrix, its bias and the LoRA delta of each token's slot. Some architectures also norm each
head of q and k, or what is added to x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_runtime.kernels.backend import AdapterTables, BaseMatrix, DecoderSpec, HeadNorms, Kernels, LayerWeights, LoraSites, PackedWeight
from gpu_runtime.kernels.batch import ForwardBatch

NUM_MATRICES = 4  # of a layer: qkv, o, gate_up, down
QKV, O_PROJ, GATE_UP, DOWN = range(NUM_MATRICES)


@dataclass(frozen=True, eq=False)
class _Vectors:
    """A layer's norms and biases. `biases` in the order of QKV, O_PROJ, GATE_UP, DOWN."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    head_norms: HeadNorms | None
    attention_out_norm: torch.Tensor | None
    mlp_out_norm: torch.Tensor | None
    biases: tuple[torch.Tensor | None, ...]


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
        self._vectors = [_vectors(layer, eps=spec.eps) for layer in layers]
        self._activate = kernels.silu_mul if spec.activation == "silu" else kernels.gelu_mul
        self.matrices = base_matrices(spec, [[kernels.pack(weight) for weight in layer_matrices(layer)] for layer in layers])
        self._weights = [matrix.weight for matrix in self.matrices]
        self._kv = kv
        self._pool = pool
        self._tables = tables

    def point(self, index: int, weight: PackedWeight) -> None:
        self._weights[index] = weight

    def __call__(self, x: torch.Tensor, *, batch: ForwardBatch) -> torch.Tensor:
        delta: torch.Tensor | None = None
        for layer, vectors in enumerate(self._vectors):
            h = self._kernels.rms_norm(x, weight=vectors.attention_norm, eps=self._spec.eps, added=delta)
            delta = self._attention(h, layer=layer, batch=batch)
            h = self._kernels.rms_norm(x, weight=vectors.mlp_norm, eps=self._spec.eps, added=delta)
            delta = self._mlp(h, layer=layer, batch=batch)
        return x if delta is None else x + delta

    def _attention(self, h: torch.Tensor, *, layer: int, batch: ForwardBatch) -> torch.Tensor:
        spec, how, vectors = self._spec, self._spec.attention[layer], self._vectors[layer]
        qkv = self._adapted(h, which=QKV, layer=layer, batch=batch)
        self._kernels.rope_kv_write(
            qkv, num_heads=spec.num_heads, rope=spec.ropes[how.rope], kv=self._kv, layer=layer, batch=batch, norms=vectors.head_norms
        )
        attended = self._kernels.paged_attention(
            qkv, num_heads=spec.num_heads, kv=self._kv, layer=layer, batch=batch, scale=spec.scale, window=how.window
        )
        return self._normed(self._adapted(attended, which=O_PROJ, layer=layer, batch=batch), vectors.attention_out_norm)

    def _mlp(self, h: torch.Tensor, *, layer: int, batch: ForwardBatch) -> torch.Tensor:
        gate_up = self._adapted(h, which=GATE_UP, layer=layer, batch=batch)
        delta = self._adapted(self._activate(gate_up), which=DOWN, layer=layer, batch=batch)
        return self._normed(delta, self._vectors[layer].mlp_out_norm)

    def _normed(self, delta: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return delta if weight is None else self._kernels.rms_norm(delta, weight=weight, eps=self._spec.eps)

    def _adapted(self, x: torch.Tensor, *, which: int, layer: int, batch: ForwardBatch) -> torch.Tensor:
        """The base linear plus each token's delta."""
        at = layer * NUM_MATRICES + which
        y = self._kernels.linear(x, weight=self._weights[at], bias=self._vectors[layer].biases[which])
        sites = self.matrices[at].sites
        self._kernels.lora_delta(y, x=x, pool=self._pool, tables=self._tables, layer=layer, sites=sites, batch=batch)
        return y


def _vectors(layer: LayerWeights, *, eps: float) -> _Vectors:
    return _Vectors(
        attention_norm=layer.attention_norm,
        mlp_norm=layer.mlp_norm,
        head_norms=None if layer.q_norm is None or layer.k_norm is None else HeadNorms(layer.q_norm, layer.k_norm, eps),
        attention_out_norm=layer.attention_out_norm,
        mlp_out_norm=layer.mlp_out_norm,
        biases=(layer.qkv_bias, layer.o_bias, None, None),
    )


def layer_matrices(layer: LayerWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As stored, in the order of QKV, O_PROJ, GATE_UP, DOWN."""
    return layer.qkv, layer.o, layer.gate_up, layer.down


def base_matrices(spec: DecoderSpec, packed: Sequence[Sequence[PackedWeight]]) -> tuple[BaseMatrix, ...]:
    """`packed`: the matrices of each layer, in the order of `layer_matrices`."""
    sites: tuple[LoraSites, ...] = (spec.qkv, spec.o, spec.gate_up, spec.down)
    return tuple(BaseMatrix(layer, *pair) for layer, row in enumerate(packed) for pair in zip(sites, row, strict=True))
