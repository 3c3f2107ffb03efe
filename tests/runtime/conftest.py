"""The three backends by name. The GPU's kernels run under Triton's interpreter: see tests/conftest.py."""

from __future__ import annotations

import pytest
import torch

from gpu_runtime.kernels.backend import Kernels, select_backend


def kernels_named(name: str) -> Kernels:
    if name == "gpu":
        from gpu_runtime.kernels.gpu.kernels import GpuKernels

        return GpuKernels()
    return select_backend(threads=2, reference=name == "reference")


@pytest.fixture(scope="module", params=["cpu", "gpu", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow, so dtypes other than bf16 wait for the full suite; and its numpy warns of poison."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get("kernels") != "gpu":
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        if callspec.params.get("dtype", torch.bfloat16) is not torch.bfloat16:
            item.add_marker(pytest.mark.full)
