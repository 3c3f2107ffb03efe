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
from gpu_runtime.kernels.cpu.compiled import compiled
from gpu_runtime.kernels.cpu.elementwise import rms_norm, silu_mul
from gpu_runtime.kernels.cpu.linear import TOKEN_BLOCK, linear, pack
from gpu_runtime.kernels.cpu.lora_delta import CHUNK, lora_delta
from gpu_runtime.kernels.cpu.sync import new_sync
from gpu_runtime.kernels.cpu.team import Team
from gpu_runtime.kernels.cpu.vectors import PANEL
from gpu_runtime.kernels.decoder import DOWN, GATE_UP, NUM_MATRICES, O_PROJ, QKV, base_matrices, layer_matrices

Array = np.ndarray[Any, Any]
PHASES = 13  # of one layer


class Weights(NamedTuple):
    """All layers stacked: norms (L, D); int64 (L) addresses of packed matrices (panels, in, PANEL), each one for itself."""

    attention_norm: Array
    qkv: Array
    o: Array
    mlp_norm: Array
    gate_up: Array
    down: Array


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


@compiled
def run_layers(sync, w, a, qkv_sites, o_sites, gate_up_sites, down_sites, s, b, cos, sin, kv, num_heads, eps, scratch):  # type: ignore[no-untyped-def]
    """w Weights, a Adapters, s Step, b Buffers; scratch f32, this thread's own."""
    p = 0
    for i in range(w.qkv.shape[0]):
        rms_norm(sync, p, b.x, b.delta, i > 0, w.attention_norm[i], eps, b.h)
        linear(sync, p + 1, w.qkv[i], b.h, b.qkv, scratch)
        lora_delta(
            sync, p + 2, b.qkv, b.h, a.pool, a.rows, a.ranks, a.scales, a.codes, i, qkv_sites.targets, qkv_sites.spans, s.chunks, scratch
        )
        rope_kv_write(sync, p + 3, b.qkv, num_heads, cos, sin, kv, i, s.positions, s.kv_slots)
        paged_attention(sync, p + 4, b.qkv, num_heads, kv, i, s.positions, s.owners, s.tables, b.attended, scratch)
        linear(sync, p + 5, w.o[i], b.attended, b.delta, scratch)
        lora_delta(
            sync,
            p + 6,
            b.delta,
            b.attended,
            a.pool,
            a.rows,
            a.ranks,
            a.scales,
            a.codes,
            i,
            o_sites.targets,
            o_sites.spans,
            s.chunks,
            scratch,
        )
        rms_norm(sync, p + 7, b.x, b.delta, True, w.mlp_norm[i], eps, b.h)
        linear(sync, p + 8, w.gate_up[i], b.h, b.gate_up, scratch)
        lora_delta(
            sync,
            p + 9,
            b.gate_up,
            b.h,
            a.pool,
            a.rows,
            a.ranks,
            a.scales,
            a.codes,
            i,
            gate_up_sites.targets,
            gate_up_sites.spans,
            s.chunks,
            scratch,
        )
        silu_mul(sync, p + 10, b.gate_up, b.inner)
        linear(sync, p + 11, w.down[i], b.inner, b.delta, scratch)
        lora_delta(
            sync,
            p + 12,
            b.delta,
            b.inner,
            a.pool,
            a.rows,
            a.ranks,
            a.scales,
            a.codes,
            i,
            down_sites.targets,
            down_sites.spans,
            s.chunks,
            scratch,
        )
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
        self._rope = spec.rope.cos.numpy(), spec.rope.sin.numpy()
        self._kv = kv.numpy()
        self._num_heads = spec.num_heads
        self._eps = np.float32(spec.eps)
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
        fixed = (self._weights, self._adapters, *self._sites, step, buffers, *self._rope, self._kv, self._num_heads, self._eps)
        self._team.run(lambda index: run_layers(sync, *fixed, scratch[index]))
        return buffers.delta

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


def _weights(layers: Sequence[LayerWeights], matrices: Sequence[BaseMatrix]) -> Weights:
    def norms(name: str) -> Array:
        return torch.stack([getattr(layer, name) for layer in layers]).float().numpy()

    addresses = np.array([matrix.weight.data.data_ptr() for matrix in matrices], np.int64).reshape(-1, NUM_MATRICES)
    qkv, o, gate_up, down = (addresses[:, which].copy() for which in (QKV, O_PROJ, GATE_UP, DOWN))
    return Weights(norms("attention_norm"), qkv, o, norms("mlp_norm"), gate_up, down)


def _addresses(weights: Weights) -> tuple[Array, ...]:
    """In the order of QKV, O_PROJ, GATE_UP, DOWN."""
    return weights.qkv, weights.o, weights.gate_up, weights.down
