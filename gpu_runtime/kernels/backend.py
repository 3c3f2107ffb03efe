"""Owns the protocol every backend implements, and which backend a device gets.

The docstrings here are the semantics; `reference.py` is the same in plain torch and is the oracle of every test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from gpu_runtime.kernels.batch import ForwardBatch


class AdapterTables(Protocol):
    """Where the pool holds each slot's rank rows; shapes in `memory/tables.py`."""

    rows: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    dtypes: torch.Tensor


@dataclass(frozen=True, eq=False)
class LoraGroup:
    """Targets of one layer that share an input x: their deltas go side by side into one y.

    targets  indices into TARGETS
    spans    [start, end) columns of y for each target
    """

    layer: int
    targets: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class RopeTables:
    """cos and sin of every position, f32 (max_positions, head_dim / 2)."""

    cos: torch.Tensor
    sin: torch.Tensor


class Kernels(Protocol):
    """One backend. Activations are f32 and contiguous; shape letters as in DESIGN 2 (T tokens, D in, O out)."""

    name: str

    def linear(self, x: torch.Tensor, *, weight: torch.Tensor) -> torch.Tensor:
        """Semantics: y = x @ weight.T. x (T, D), weight (O, D), result (T, O) contiguous."""
        ...

    def rms_norm(self, x: torch.Tensor, *, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None) -> torch.Tensor:
        """Semantics: x += added (in place, where given); result = x / sqrt(mean(x^2) + eps) * weight. All (T, D); weight (D)."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Semantics: result = silu(gate) * up for gate_up = [gate | up]. gate_up (T, 2F), result (T, F)."""
        ...

    def lora_delta(
        self, y: torch.Tensor, *, x: torch.Tensor, pool: torch.Tensor, tables: AdapterTables, group: LoraGroup, batch: ForwardBatch
    ) -> None:
        """Semantics: y[t, span] += (scale * (x[t] @ A.T)) @ B.T, A and B those of token t's slot, for each target of the group.

        In place. x (T, D), y (T, O), pool uint8 (P, page_bytes). Rows whose slot is -1 are left alone, bit for bit, and so
        are targets of rank 0. Accumulates in f32 whatever the rows are stored as; a row's result does not depend on the
        other rows of the batch; bytes beyond a row's length and ranks beyond the true one are never read.
        """
        ...

    def rope_kv_write(
        self, qkv: torch.Tensor, *, num_heads: int, rope: RopeTables, kv: torch.Tensor, layer: int, batch: ForwardBatch
    ) -> None:
        """Semantics: rotate q and k by position (halves convention); kv[page, layer, 0 | 1, :, offset] = k, v of each token.

        qkv (T, (num_heads + 2 kv_heads) * head_dim) = [q | k | v], q rotated in place (k may or may not be);
        kv as `memory.layout.kv_view` shapes it. Each token goes to batch.kv_slots.
        """
        ...

    def paged_attention(self, qkv: torch.Tensor, *, num_heads: int, kv: torch.Tensor, layer: int, batch: ForwardBatch) -> torch.Tensor:
        """Semantics: out[t, h] = softmax(q[t, h] . K[0..position of t] / sqrt(head_dim)) @ V[0..position of t], causal, GQA.

        Result (T, num_heads * head_dim) f32. Nothing beyond a request's context is loaded, so stale page bytes never
        count, and a request's result does not depend on the rest of the batch.
        """
        ...


def select_backend(device: str = "cpu", *, reference: bool = False) -> Kernels:
    """The fastest backend for `device`, or the plain-torch reference."""
    from gpu_runtime.kernels.reference import ReferenceKernels  # noqa: PLC0415 - it imports the protocol above

    if device != "cpu" and not reference:
        raise ValueError(f"device is {device!r}; this version computes on cpu")
    return ReferenceKernels()
