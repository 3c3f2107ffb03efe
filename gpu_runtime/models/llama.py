"""Llama 2 and 3, and what shares its decoder (SmolLM2, TinyLlama). Rotary frequencies may be smoothed (`llama3`)."""

from __future__ import annotations

from gpu_runtime.models.architecture import SILU, Architecture, bias_of_attention, full_attention

LLAMA = Architecture("llama", max_positions=2048, allowed=SILU, layers=full_attention, biased=bias_of_attention)
