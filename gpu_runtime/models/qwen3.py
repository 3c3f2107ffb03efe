"""Qwen 3: Llama with an RMSNorm over each head of q and k before they are rotated. Dense models only."""

from __future__ import annotations

from gpu_runtime.models.architecture import SILU, Architecture, bias_of_attention, windowed_after

QWEN3 = Architecture("qwen3", max_positions=32768, allowed=SILU, layers=windowed_after, biased=bias_of_attention, head_norms=True)
