"""Qwen 2 and 2.5: Llama with a bias on q, k and v, and a window in the later layers where `use_sliding_window` is set."""

from __future__ import annotations

from gpu_runtime.models.architecture import SILU, Architecture, Settings, windowed_after


def _biased(_settings: Settings) -> frozenset[str]:
    return frozenset({"qkv"})


QWEN2 = Architecture("qwen2", max_positions=32768, allowed=SILU, layers=windowed_after, biased=_biased)
