"""One installation for all fault tests, each in a tenant of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.plant import Plant, making_plant
from tests.postgresql import PostgreSQL
from tests.servers import S3Server


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory, postgresql_server: PostgreSQL, s3_server: S3Server) -> Iterator[Plant]:
    """The registry runs, with a ready base model `tiny`; workers do not."""
    with making_plant(tmp_path_factory.mktemp("plant"), postgresql=postgresql_server, s3=s3_server) as plant:
        plant.start("api")
        plant.start("worker-1")
        plant.import_base_model("tiny")
        plant.kill("worker-1")
        yield plant
