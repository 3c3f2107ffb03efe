"""The skinny product against float64, over ragged shapes, and its independence of the rest of the batch."""

from __future__ import annotations

import pytest
import torch

from gpu_runtime.kernels.cpu_linear import LANES, MAX_TOKENS, ROWS, linear

TOKENS = (1, 2, LANES - 1, LANES, LANES + 1, 3 * LANES, MAX_TOKENS, MAX_TOKENS + 1)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize(("num_out", "num_k"), [(1, 1), (ROWS - 1, 7), (ROWS, 64), (ROWS + 1, 576), (4 * ROWS + 5, 1536)])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_agrees_with_float64(num_tokens: int, num_out: int, num_k: int, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens * 31 + num_out)
    x, weight = torch.randn(num_tokens, num_k, generator=generator), torch.randn(num_out, num_k, generator=generator)
    got = linear(x, weight=weight, num_threads=num_threads)
    want = x.double() @ weight.double().t()
    # A chain of K fused multiply-adds: the worst case is K * eps times the sum of magnitudes.
    bound = num_k * torch.finfo(torch.float32).eps * (x.abs().double() @ weight.abs().double().t())
    assert got.is_contiguous()
    assert ((got - want).abs() <= bound).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    x, weight = torch.randn(MAX_TOKENS, 192), torch.randn(50, 192)
    together = linear(x, weight=weight, num_threads=2)
    for count in (1, 3, 17, 64):
        assert torch.equal(linear(x[:count], weight=weight, num_threads=1), together[:count])
    poisoned = x.clone()
    poisoned[1::2] = float("nan")
    assert torch.equal(linear(poisoned, weight=weight, num_threads=2)[0::2], together[0::2])
