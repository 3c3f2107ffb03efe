"""One tiny model and one replica over it for the server's tests; tests that need another engine build their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.core import AdapterKey
from registry.artifact.base import BaseSpec
from tests.generate import generate_adapter
from tests.runtime.server.replica import BASE_DIGEST, TENANT, Replica, engine_replica
from tests.tiny import make_tiny_model


@dataclass(frozen=True)
class World:
    """A replica, with two adapters that its source knows."""

    replica: Replica
    adapters: tuple[AdapterKey, AdapterKey]
    folders: tuple[Path, Path]
    model_dir: Path


@pytest.fixture(scope="package")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), max_positions=4096)


@pytest.fixture(scope="package")
def world(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    import json

    base = BaseSpec.from_config(json.loads((model_dir / "config.json").read_text()))
    root = tmp_path_factory.mktemp("adapters")
    folders = [generate_adapter(base, seed=seed, scale=0.5).write(root / str(seed)) for seed in (1, 2)]
    source = LocalSource(base_digest=BASE_DIGEST)
    keys = [source.add(folder, tenant=TENANT) for folder in folders]
    with engine_replica(model_dir, source) as replica:
        yield World(replica, (keys[0], keys[1]), (folders[0], folders[1]), model_dir)


@pytest.fixture
def replica(world: World) -> Iterator[Replica]:
    """The shared replica; whatever a test did, nothing may be left running."""
    yield world.replica
    world.replica.wait_idle()
