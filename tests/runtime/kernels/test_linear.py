"""The base product, the norm, the activation and the shared-out phases of the CPU backend."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
import torch.nn.functional as F

from gpu_runtime.kernels.backend import Kernels, select_backend


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_out", "depth"), [(1, 1), (31, 7), (32, 64), (33, 123), (960, 576), (100, 1536), (384, 64)])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 5, 6, 7, 8, 11, 16, 63, 64, 65, 130])
def test_linear_equals_the_fp64_product(kernels: Kernels, num_out: int, depth: int, num_tokens: int) -> None:
    x, weight = randn(num_tokens, depth), randn(num_out, depth, seed=1)
    y = kernels.linear(x, weight=kernels.pack(weight))
    assert y.shape == (num_tokens, num_out)
    assert y.is_contiguous()
    assert torch.allclose(y.double(), x.double() @ weight.double().T, rtol=0, atol=2.0**-24 * depth * 8)


@pytest.mark.parametrize(("num_out", "num_tokens"), [(1, 1), (33, 3), (64, 65)])
def test_a_bias_is_added_to_every_row(kernels: Kernels, num_out: int, num_tokens: int) -> None:
    x, weight, bias = randn(num_tokens, 48), randn(num_out, 48, seed=1), randn(num_out, seed=2)
    y = kernels.linear(x, weight=kernels.pack(weight), bias=bias)
    assert torch.allclose(y.double(), x.double() @ weight.double().T + bias.double(), rtol=0, atol=2.0**-24 * 48 * 8)


def test_a_row_of_the_product_does_not_depend_on_its_batch() -> None:
    x, weight = randn(77, 576), randn(1000, 576, seed=1)
    pair, single = select_backend(threads=2), select_backend(threads=1)
    whole = pair.linear(x, weight=pair.pack(weight))
    packed = single.pack(weight)
    for start, end in [(0, 1), (3, 5), (10, 26), (40, 47), (76, 77)]:
        assert single.linear(x[start:end].contiguous(), weight=packed).equal(whole[start:end])


def test_a_row_of_nan_stays_alone(kernels: Kernels) -> None:
    x, weight = randn(16, 64), kernels.pack(randn(96, 64, seed=1))
    clean = kernels.linear(x, weight=weight)
    x[5] = torch.nan
    dirty = kernels.linear(x, weight=weight)
    others = [at for at in range(16) if at != 5]
    assert dirty[others].equal(clean[others])
    assert dirty[5].isnan().all()


@pytest.mark.parametrize("width", [1, 15, 64, 576, 2048])
def test_rms_norm_adds_in_place_and_normalises(kernels: Kernels, width: int) -> None:
    x, added, weight = randn(5, width), randn(5, width, seed=1), randn(width, seed=2)
    total = x + added
    expected = total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = kernels.rms_norm(x, weight=weight, eps=1e-5, added=added)
    assert x.equal(total)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(kernels.rms_norm(total, weight=weight, eps=1e-5), out)


def test_silu_mul_over_the_whole_range(kernels: Kernels) -> None:
    gate = torch.cat((torch.linspace(-87, 110, 4001), torch.tensor([0.0, -0.0, 1e-20, 1e30, -1e30])))
    up = randn(gate.numel())
    out = kernels.silu_mul(torch.stack((torch.cat((gate, up)), torch.cat((gate.flip(0), up)))))
    expected = F.silu(gate.double()) * up.double()
    assert torch.allclose(out[0].double(), expected, rtol=2e-6, atol=1e-30)
    assert kernels.silu_mul(torch.tensor([[math.nan, 1.0]])).isnan().all()
    assert kernels.silu_mul(torch.tensor([[-95.0, 1.0]])).abs() < 1e-36


def test_gelu_mul_over_the_whole_range(kernels: Kernels) -> None:
    gate = torch.cat((torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-20, 1e12, -1e12])))
    up = randn(gate.numel())
    out = kernels.gelu_mul(torch.cat((gate, up))[None])[0]
    expected = F.gelu(gate.double(), approximate="tanh") * up.double()
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert kernels.gelu_mul(torch.tensor([[math.nan, 1.0]])).isnan().all()


def test_many_calls_from_another_thread_give_the_same_result() -> None:
    """The step loop is not the thread that made the backend; late helpers must find nothing left to do."""
    kernels = select_backend(threads=4)
    x, weight = randn(16, 576), kernels.pack(randn(640, 576, seed=1))
    expected = kernels.linear(x, weight=weight)
    wrong: list[int] = []

    def loop() -> None:
        wrong.extend(at for at in range(400) if not kernels.linear(x, weight=weight).equal(expected))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert wrong == []


def test_helpers_leave_with_their_team() -> None:
    kernels = select_backend(threads=3)
    helpers = [thread for thread in threading.enumerate() if thread.name.startswith("lorary-kernels")]
    kernels.linear(randn(2, 8), weight=kernels.pack(randn(4, 8)))
    mine = helpers[-2:]
    del kernels
    gc.collect()
    for thread in mine:
        thread.join(timeout=10)
        assert not thread.is_alive()
