"""The CPU backend as the protocol of `kernels/backend.py`: each op one compiled call over the same code as the decoder's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

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
from gpu_runtime.kernels.cpu import attention, elementwise, linear, lora_delta
from gpu_runtime.kernels.cpu.compiled import compiled
from gpu_runtime.kernels.cpu.decoder import CompiledDecoder, adapter_arrays, scratch_size, site_arrays, step_arrays
from gpu_runtime.kernels.cpu.sync import new_sync
from gpu_runtime.kernels.cpu.team import Team
from gpu_runtime.kernels.rows import read_factors


@compiled
def _linear(sync, packed, bias, x, y, scratch):  # type: ignore[no-untyped-def]
    linear.linear(sync, 0, packed.ctypes.data, bias, x, y, scratch)


@compiled
def _rms_norm(sync, x, added, has_added, weight, eps, y):  # type: ignore[no-untyped-def]
    elementwise.rms_norm(sync, 0, x, added, has_added, weight, eps, y)


@compiled
def _silu_mul(sync, gate_up, y):  # type: ignore[no-untyped-def]
    elementwise.silu_mul(sync, 0, gate_up, y)


@compiled
def _gelu_mul(sync, gate_up, y):  # type: ignore[no-untyped-def]
    elementwise.gelu_mul(sync, 0, gate_up, y)


@compiled
def _lora_delta(sync, y, x, a, layer, sites, chunks, scratch):  # type: ignore[no-untyped-def]
    lora_delta.lora_delta(sync, 0, y, x, a.pool, a.rows, a.ranks, a.scales, a.codes, layer, sites.targets, sites.spans, chunks, scratch)


@compiled
def _rope_kv_write(sync, qkv, num_heads, cos, sin, kv, layer, positions, kv_slots, q_norm, k_norm, eps):  # type: ignore[no-untyped-def]
    attention.rope_kv_write(sync, 0, qkv, num_heads, cos, sin, kv, layer, positions, kv_slots, q_norm, k_norm, eps)


@compiled
def _paged_attention(sync, qkv, num_heads, kv, layer, s, out, scale, window, scratch):  # type: ignore[no-untyped-def]
    attention.paged_attention(sync, 0, qkv, num_heads, kv, layer, s.positions, s.owners, s.tables, out, scale, window, scratch)


class CpuKernels:
    """See `backend.Kernels`. One team of threads serves everything; torch's own pool should then have one thread."""

    name = "cpu"
    activations: torch.dtype | None = torch.float32

    def __init__(self, *, threads: int) -> None:
        self._team = Team(threads)

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        return PackedWeight(linear.pack(weight), weight.shape[0])

    def decoder(
        self, spec: DecoderSpec, *, layers: Sequence[LayerWeights], kv: torch.Tensor, pool: torch.Tensor, tables: AdapterTables
    ) -> Decoder:
        return CompiledDecoder(self._team, spec=spec, layers=layers, kv=kv, pool=pool, tables=tables)

    def linear(self, x: torch.Tensor, *, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.empty((x.shape[0], weight.num_out))
        arrays = weight.data.numpy(), _vector(bias), x.numpy(), y.numpy()
        self._share(lambda sync, scratch: _linear(sync, *arrays, scratch))
        return y

    def rms_norm(self, x: torch.Tensor, *, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.empty_like(x)
        other = (x if added is None else added).numpy()
        arrays = x.numpy(), other, added is not None, weight.numpy(), np.float32(eps), y.numpy()
        _rms_norm(new_sync(1), *arrays)
        return y

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        y = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2))
        _silu_mul(new_sync(1), gate_up.numpy(), y.numpy())
        return y

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        y = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2))
        _gelu_mul(new_sync(1), gate_up.numpy(), y.numpy())
        return y

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
        arrays = y.numpy(), x.numpy(), adapter_arrays(pool, tables), layer, site_arrays(sites), step_arrays(batch).chunks
        self._share(lambda sync, scratch: _lora_delta(sync, *arrays, scratch), max_rank=tables.rows.shape[4])

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
        factors = read_factors(pool, tables=tables, slot=slot, layer=layer, sites=sites, depth=weight.data.shape[1])
        linear.merge(out, weight=weight.data, factors=factors)

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
        step = step_arrays(batch)
        arrays = qkv.numpy(), num_heads, rope.cos.numpy(), rope.sin.numpy(), kv.numpy(), layer, step.positions, step.kv_slots
        q_norm, k_norm, eps = (None, None, 0.0) if norms is None else (norms.q, norms.k, norms.eps)
        _rope_kv_write(new_sync(1), *arrays, _vector(q_norm), _vector(k_norm), np.float32(eps))

    def paged_attention(
        self, qkv: torch.Tensor, *, num_heads: int, kv: torch.Tensor, layer: int, batch: ForwardBatch, scale: float, window: int = 0
    ) -> torch.Tensor:
        out = torch.empty((qkv.shape[0], num_heads * kv.shape[5]))
        arrays = qkv.numpy(), num_heads, kv.numpy(), layer, step_arrays(batch), out.numpy(), np.float32(scale), window
        self._share(lambda sync, scratch: _paged_attention(sync, *arrays, scratch), longest=int(batch.context_lens.max()))
        return out

    def _share(self, call: Callable[[Any, Any], None], *, longest: int = 1, max_rank: int = 1) -> None:
        """Run one phase on the whole team."""
        sync, size = new_sync(1), scratch_size(longest=longest, max_rank=max_rank)
        self._team.run(lambda _index: call(sync, np.empty(size, np.float32)))


def _vector(weight: torch.Tensor | None) -> np.ndarray[Any, Any]:
    """f32, empty where there is none: compiled code knows absence by length."""
    return np.empty(0, np.float32) if weight is None else weight.float().numpy()
