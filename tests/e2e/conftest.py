"""One running Lorary with the real base model, shared by the end-to-end tests; each test makes its own tenants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.running import Lorary, running
from tests.otlp import Collector, collecting

_numbers = itertools.count()


@pytest.fixture(scope="session")
def otlp() -> Iterator[Collector]:
    """Where the spans of the shared Lorary go."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def lorary(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path, otlp: Collector) -> Iterator[Lorary]:
    with running(tmp_path_factory.mktemp("lorary"), base_model=f"smollm2={base_model_dir}", settings=otlp.environment) as system:
        yield system


@pytest.fixture
def tenant_name() -> Callable[[str], str]:
    return lambda stem: f"{stem}-{next(_numbers)}"
