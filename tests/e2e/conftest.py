"""One running Lorary with the real base model, shared by the end-to-end tests; each test makes its own tenants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.running import Lorary, running

_numbers = itertools.count()


@pytest.fixture(scope="session")
def lorary(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path) -> Iterator[Lorary]:
    with running(tmp_path_factory.mktemp("lorary"), base_model=f"smollm2={base_model_dir}") as system:
        yield system


@pytest.fixture
def tenant_name() -> Callable[[str], str]:
    return lambda stem: f"{stem}-{next(_numbers)}"
