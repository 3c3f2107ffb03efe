"""Owns the protocol every backend implements, and which backend a device gets.

The docstrings here are the semantics; `reference.py` is the same in plain torch and is the oracle of every test.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from gpu_runtime.kernels.batch import ForwardBatch


class AdapterTables(Protocol):
    """Where the pool holds each slot's rank rows; shapes in `memory/tables.py`."""

    rows: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    dtypes: torch.Tensor

    @property
    def stored_codes(self) -> tuple[int, ...]: ...

    def code_of(self, slot: int) -> int: ...


@dataclass(frozen=True)
class LoraSites:
    """Targets that share an input x: their deltas go side by side into one y.

    targets  indices into TARGETS
    spans    [start, end) columns of y for each target
    """

    targets: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class RopeTables:
    """cos and sin of every position, f32 (max_positions, head_dim / 2)."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix in the order its backend streams it; only the backend that packed it can read `data`."""

    data: torch.Tensor
    num_out: int


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder layer as stored, (out, in): qkv = [q | k | v] rows, gate_up = [gate | up] rows; norms f32 (hidden).

    What only some architectures have is None elsewhere: biases f32 (out), norms of each head of q and k f32 (head_dim),
    norms of what attention and MLP give before it is added to the stream f32 (hidden).
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMSNorm of each head of q and of k, before they are rotated. Weights f32 (head_dim)."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends: `rope` indexes DecoderSpec.ropes; `window` is how many tokens back a query sees, itself counted (0: all)."""

    rope: int = 0
    window: int = 0


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """What a stack of layers needs to know beside its weights; spans as in LoraGroup, targets as indices into TARGETS.

    `attention`: one a layer. `scale`: of attention scores. `activation`: of the gate.
    """

    num_heads: int
    eps: float
    ropes: tuple[RopeTables, ...]
    attention: tuple[LayerAttention, ...]
    scale: float
    activation: Literal["silu", "gelu_tanh"]
    qkv: LoraSites
    o: LoraSites
    gate_up: LoraSites
    down: LoraSites


@dataclass(frozen=True, eq=False)
class BaseMatrix:
    """One matrix of a decoder: its layer, the targets that it stacks, its base weights, which nothing ever writes to."""

    layer: int
    sites: LoraSites
    weight: PackedWeight


class Decoder(Protocol):
    """All layers of a model, bound to its weights and to the pool."""

    @property
    def matrices(self) -> Sequence[BaseMatrix]:
        """Every matrix that a delta can be merged into, in layer order."""
        ...

    def point(self, index: int, weight: PackedWeight) -> None:
        """Steps from now on use `weight` in the place of `matrices[index]`; its own weight points back. Between steps only."""
        ...

    def __call__(self, x: torch.Tensor, *, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states (T, D) after the last layer, before the final norm. K and V of the batch are written to the pool."""
        ...


class Kernels(Protocol):
    """One backend. Activations are contiguous, of dtype `activations` (None: the weights' own); T tokens, D in, O out."""

    name: str
    activations: torch.dtype | None

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """`weight` (O, D) made ready for `linear`."""
        ...

    def decoder(
        self, spec: DecoderSpec, *, layers: Sequence[LayerWeights], kv: torch.Tensor, pool: torch.Tensor, tables: AdapterTables
    ) -> Decoder:
        """The composition of the ops below over all `layers`; the reference's is `decoder.OpByOpDecoder`."""
        ...

    def linear(self, x: torch.Tensor, *, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Semantics: y = x @ weight.T + bias. x (T, D), weight packed from (O, D), bias f32 (O), result (T, O) contiguous."""
        ...

    def rms_norm(self, x: torch.Tensor, *, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None) -> torch.Tensor:
        """Semantics: x += added (in place, where given); result = x / sqrt(mean(x^2) + eps) * weight. All (T, D); weight (D)."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Semantics: result = silu(gate) * up for gate_up = [gate | up]. gate_up (T, 2F), result (T, F)."""
        ...

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The same with gelu in its tanh form: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))."""
        ...

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
        """Semantics: y[t, span] += (scale * (x[t] @ A.T)) @ B.T, A and B those of token t's slot at `layer`, for each target of `sites`.

        In place. x (T, D), y (T, O), pool uint8 (P, page_bytes). Rows whose slot is -1 are left alone, bit for bit, and so
        are targets of rank 0. Accumulates in f32 whatever the rows are stored as; a row's result does not depend on the
        other rows of the batch; bytes beyond a row's length and ranks beyond the true one are never read.
        """
        ...

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
        """Semantics: out = W + scale * B @ A for each target of `sites` that `slot` touches at `layer`, W elsewhere.

        `weight` packed from W (O, D); `out` of the shape, dtype and order of `weight.data`, which is only read. One rounding:
        the sum is f32 and becomes `out`'s dtype once.
        """
        ...

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
        """Semantics: rotate q and k by position (halves convention); kv[page, layer, 0 | 1, :, offset] = k, v of each token.

        With `norms` each head of q and k is first x / sqrt(mean(x^2) + eps) * weight.
        qkv (T, (num_heads + 2 kv_heads) * head_dim) = [q | k | v], q rotated in place (k may or may not be);
        kv as `memory.layout.kv_view` shapes it. Each token goes to batch.kv_slots.
        """
        ...

    def paged_attention(
        self, qkv: torch.Tensor, *, num_heads: int, kv: torch.Tensor, layer: int, batch: ForwardBatch, scale: float, window: int = 0
    ) -> torch.Tensor:
        """Semantics: out[t, h] = softmax(scale * q[t, h] . K[first..position of t]) @ V[first..position of t], causal, GQA.

        first = max(0, position + 1 - window), or 0 where `window` is 0.
        Result (T, num_heads * head_dim). Nothing beyond a request's context is loaded, so stale page bytes never
        count, and a request's result does not depend on the rest of the batch.
        """
        ...


def select_backend(device: str = "cpu", *, threads: int | None = None, reference: bool = False) -> Kernels:
    """The fastest backend for `device`, or the plain-torch reference.

    `threads` (default: every core this process may use) counts the calling thread. Raises ValueError for another device.
    """
    if reference:
        from gpu_runtime.kernels.reference import ReferenceKernels  # noqa: PLC0415 - a backend loads only when chosen

        return ReferenceKernels()
    if torch.device(device).type == "cuda":
        from gpu_runtime.kernels.gpu.kernels import GpuKernels  # noqa: PLC0415 - Triton loads only where it computes

        return GpuKernels()
    if device != "cpu":
        raise ValueError(f"device is {device!r}; this runtime computes on cpu and on cuda")
    from gpu_runtime.kernels.cpu.kernels import CpuKernels  # noqa: PLC0415 - numba loads only where it computes

    return CpuKernels(threads=threads or _usable_cores())


def _usable_cores() -> int:
    """Cores that this process may run on, where the system can say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
