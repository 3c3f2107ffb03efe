"""All layers of a step as one compiled call: `kernels/decoder.py` again, phase by phase, shared by the threads of a team.

One call a step instead of some 400, and no thread is woken or put to sleep between ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_runtime.core import NO_SLOT
from gpu_runtime.kernels.backend import AdapterTables, BaseMatrix, DecoderSpec, LayerWeights, LoraSites, PackedWeight
from gpu_runtime.kernels.batch import ForwardBatch
from gpu_runtime.kernels.cpu.attention import paged_attention, rope_kv_write
from gpu_runtime.kernels.cpu.compiled import compiled, inlined
from gpu_runtime.kernels.cpu.elementwise import gelu_mul, rms_norm, silu_mul
from gpu_runtime.kernels.cpu.linear import TOKEN_BLOCK, linear, pack
from gpu_runtime.kernels.cpu.lora_delta import CHUNK, lora_delta
from gpu_runtime.kernels.cpu.sync import new_sync
from gpu_runtime.kernels.cpu.team import Team
from gpu_runtime.kernels.cpu.vectors import PANEL
from gpu_runtime.kernels.decoder import DOWN, GATE_UP, NUM_MATRICES, O_PROJ, QKV, base_matrices, layer_matrices

Array = np.ndarray[Any, Any]
PHASES = 15  # of one layer; those that an architecture lacks are passed by


class Weights(NamedTuple):
    """All layers stacked: norms (L, D) and biases (L, O), or (L, 0) where there are none.

    Packed matrices (panels, in, PANEL) are int64 (L) addresses, each one for itself.
    """

    attention_norm: Array
    qkv: Array
    o: Array
    mlp_norm: Array
    gate_up: Array
    down: Array
    qkv_bias: Array
    o_bias: Array
    q_norm: Array
    k_norm: Array
    attention_out_norm: Array
    mlp_out_norm: Array
    no_bias: Array  # (0)


class Attention(NamedTuple):
    """cos and sin of each rope (ropes, P, head_dim / 2); the rope and the window of each layer int64 (L)."""

    cos: Array
    sin: Array
    ropes: Array
    windows: Array
    num_heads: int
    scale: np.float32
    is_gelu: bool  # the activation of the MLP
    eps: np.float32


class Adapters(NamedTuple):
    """The pool's bytes and the slot tables."""

    pool: Array
    rows: Array
    ranks: Array
    scales: Array
    codes: Array


class Sites(NamedTuple):
    """LoraSites as arrays: targets int32 (G), spans int32 (G, 2)."""

    targets: Array
    spans: Array


class Step(NamedTuple):
    """The batch: positions, kv_slots int64 (T), owners int32 (T), tables int32 (R, M), chunks int32 (C, 3)."""

    positions: Array
    kv_slots: Array
    owners: Array
    tables: Array
    chunks: Array


class Buffers(NamedTuple):
    """Activations f32, a row a token; `delta` is what the next norm adds to x."""

    x: Array
    h: Array
    qkv: Array
    attended: Array
    delta: Array
    gate_up: Array
    inner: Array


@inlined
def _adapt(sync, phase, y, x, a, layer, sites, s, scratch):  # type: ignore[no-untyped-def]
    lora_delta(
        sync, phase, y, x, a.pool, a.rows, a.ranks, a.scales, a.codes, layer, sites.targets, sites.spans, s.chunks, scratch
    )  # fmt: skip


@compiled
def run_layers(sync, w, a, qkv_sites, o_sites, gate_up_sites, down_sites, s, b, how, kv, scratch):  # type: ignore[no-untyped-def]
    """w Weights, a Adapters, s Step, b Buffers, how Attention; scratch f32, this thread's own.

    What is added to x next lies in b.delta, or in b.h where the architecture norms it first.
    """
    p, eps = 0, how.eps
    norms_attention, norms_mlp = w.attention_out_norm.shape[1] > 0, w.mlp_out_norm.shape[1] > 0
    for i in range(w.qkv.shape[0]):
        rms_norm(sync, p, b.x, b.h if norms_mlp else b.delta, i > 0, w.attention_norm[i], eps, b.h)
        linear(sync, p + 1, w.qkv[i], w.qkv_bias[i], b.h, b.qkv, scratch)
        _adapt(sync, p + 2, b.qkv, b.h, a, i, qkv_sites, s, scratch)
        cos, sin = how.cos[how.ropes[i]], how.sin[how.ropes[i]]
        rope_kv_write(sync, p + 3, b.qkv, how.num_heads, cos, sin, kv, i, s.positions, s.kv_slots, w.q_norm[i], w.k_norm[i], eps)
        paged_attention(
            sync, p + 4, b.qkv, how.num_heads, kv, i, s.positions, s.owners, s.tables, b.attended, how.scale, how.windows[i], scratch
        )  # fmt: skip
        linear(sync, p + 5, w.o[i], w.o_bias[i], b.attended, b.delta, scratch)
        _adapt(sync, p + 6, b.delta, b.attended, a, i, o_sites, s, scratch)
        if norms_attention:
            rms_norm(sync, p + 13, b.delta, b.delta, False, w.attention_out_norm[i], eps, b.h)
        rms_norm(sync, p + 7, b.x, b.h if norms_attention else b.delta, True, w.mlp_norm[i], eps, b.h)
        linear(sync, p + 8, w.gate_up[i], w.no_bias, b.h, b.gate_up, scratch)
        _adapt(sync, p + 9, b.gate_up, b.h, a, i, gate_up_sites, s, scratch)
        if how.is_gelu:
            gelu_mul(sync, p + 10, b.gate_up, b.inner)
        else:
            silu_mul(sync, p + 10, b.gate_up, b.inner)
        linear(sync, p + 11, w.down[i], w.no_bias, b.inner, b.delta, scratch)
        _adapt(sync, p + 12, b.delta, b.inner, a, i, down_sites, s, scratch)
        if norms_mlp:
            rms_norm(sync, p + 14, b.delta, b.delta, False, w.mlp_out_norm[i], eps, b.h)
        p += PHASES


class CompiledDecoder:
    """See `backend.Decoder`. Compiles (or loads from numba's cache) when it is made, not in the first step."""

    def __init__(
        self, team: Team, *, spec: DecoderSpec, layers: Sequence[LayerWeights], kv: torch.Tensor, pool: torch.Tensor, tables: AdapterTables
    ) -> None:
        if kv.dtype != torch.float32:
            raise ValueError(f"kv_dtype is {kv.dtype}; the CPU backend keeps K and V in float32")
        self._team = team
        self.matrices = base_matrices(spec, _packed(layers))
        self._weights = _weights(layers, self.matrices)
        self._adapters = adapter_arrays(pool, tables)
        self._sites = [site_arrays(sites) for sites in (spec.qkv, spec.o, spec.gate_up, spec.down)]
        self._attention = _attention(spec)
        self._norms_last = layers[0].mlp_out_norm is not None
        self._kv = kv.numpy()
        self._scratch = [np.empty(0, np.float32)] * team.size
        self._widths = (layers[0].qkv.shape[0], layers[0].o.shape[1], layers[0].gate_up.shape[0], layers[0].down.shape[1])
        self._run(_empty_step(), np.empty((0, layers[0].o.shape[0]), np.float32), longest=1)

    def point(self, index: int, weight: PackedWeight) -> None:
        layer, which = divmod(index, NUM_MATRICES)
        _addresses(self._weights)[which][layer] = weight.data.data_ptr()

    def __call__(self, x: torch.Tensor, *, batch: ForwardBatch) -> torch.Tensor:
        longest = int(batch.context_lens.max())
        delta = self._run(step_arrays(batch), x.numpy(), longest=longest)
        return x.add_(torch.from_numpy(delta))

    def _run(self, step: Step, x: Array, *, longest: int) -> Array:
        buffers = self._buffers(x)
        self._grow_scratch(longest)
        scratch = self._scratch
        sync = new_sync(PHASES * len(self._weights.attention_norm))
        fixed = (self._weights, self._adapters, *self._sites, step, buffers, self._attention, self._kv)
        self._team.run(lambda index: run_layers(sync, *fixed, scratch[index]))
        return buffers.h if self._norms_last else buffers.delta

    def _buffers(self, x: Array) -> Buffers:
        def rows(width: int) -> Array:
            return np.empty((x.shape[0], width), np.float32)

        qkv, attended, gate_up, inner = self._widths
        hidden = x.shape[1]
        return Buffers(x, rows(hidden), rows(qkv), rows(attended), rows(hidden), rows(gate_up), rows(inner))

    def _grow_scratch(self, longest: int) -> None:
        wanted = scratch_size(longest=longest, max_rank=self._adapters.rows.shape[4])
        if self._scratch[0].shape[0] < wanted:
            self._scratch = [np.empty(2 * wanted, np.float32) for _ in range(self._team.size)]


def scratch_size(*, longest: int, max_rank: int) -> int:
    """f32 elements a thread needs: a partial panel, the rank vectors of four tokens, the scores of four heads."""
    return max(TOKEN_BLOCK * PANEL, 4 * max_rank, 4 * longest)


def adapter_arrays(pool: torch.Tensor, tables: AdapterTables) -> Adapters:
    return Adapters(pool.numpy(), tables.rows.numpy(), tables.ranks.numpy(), tables.scales.numpy(), tables.dtypes.numpy())


def site_arrays(sites: LoraSites) -> Sites:
    return Sites(np.array(sites.targets, np.int32), np.array(sites.spans, np.int32))


def step_arrays(batch: ForwardBatch) -> Step:
    lengths = np.diff(batch.query_starts.numpy())
    owners = np.repeat(np.arange(batch.num_requests, dtype=np.int32), lengths)
    return Step(batch.positions.numpy(), batch.kv_slots.numpy(), owners, batch.block_tables.numpy(), chunk_table(batch))


def chunk_table(batch: ForwardBatch) -> Array:
    """Segments that have an adapter, cut into chunks of up to CHUNK tokens: int32 (C, 3) = (first token, number, slot)."""
    chunks = [
        (first, min(CHUNK, end - first), slot)
        for start, end, slot in batch.segments
        if slot != NO_SLOT
        for first in range(start, end, CHUNK)
    ]
    return np.array(chunks, np.int32).reshape(-1, 3)


def _empty_step() -> Step:
    none, table = np.empty(0, np.int64), np.empty((0, 1), np.int32)
    return Step(none, none, np.empty(0, np.int32), table, np.empty((0, 3), np.int32))


def _packed(layers: Sequence[LayerWeights]) -> list[list[PackedWeight]]:
    return [[PackedWeight(pack(weight), weight.shape[0]) for weight in layer_matrices(layer)] for layer in layers]


def _attention(spec: DecoderSpec) -> Attention:
    return Attention(
        cos=torch.stack([rope.cos for rope in spec.ropes]).numpy(),
        sin=torch.stack([rope.sin for rope in spec.ropes]).numpy(),
        ropes=np.array([layer.rope for layer in spec.attention], np.int64),
        windows=np.array([layer.window for layer in spec.attention], np.int64),
        num_heads=spec.num_heads,
        scale=np.float32(spec.scale),
        is_gelu=spec.activation == "gelu_tanh",
        eps=np.float32(spec.eps),
    )


def _weights(layers: Sequence[LayerWeights], matrices: Sequence[BaseMatrix]) -> Weights:
    def vectors(name: str) -> Array:
        found = [getattr(layer, name) for layer in layers]
        return np.empty((len(layers), 0), np.float32) if found[0] is None else torch.stack(found).float().numpy()

    addresses = np.array([matrix.weight.data.data_ptr() for matrix in matrices], np.int64).reshape(-1, NUM_MATRICES)
    qkv, o, gate_up, down = (addresses[:, which].copy() for which in (QKV, O_PROJ, GATE_UP, DOWN))
    rest = {name: vectors(name) for name in Weights._fields if name not in ("qkv", "o", "gate_up", "down", "no_bias")}
    return Weights(qkv=qkv, o=o, gate_up=gate_up, down=down, no_bias=np.empty(0, np.float32), **rest)


def _addresses(weights: Weights) -> tuple[Array, ...]:
    """In the order of QKV, O_PROJ, GATE_UP, DOWN."""
    return weights.qkv, weights.o, weights.gate_up, weights.down
