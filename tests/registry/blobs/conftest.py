"""Stores on S3, empty."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from registry.blobs.s3 import S3BlobStore
from tests.registry.places import Place, make_place, s3_settings
from tests.servers import S3Server

MakeS3 = Callable[..., S3BlobStore]


@pytest.fixture
def place(s3_server: S3Server) -> Place:
    return make_place(s3_server)


@pytest.fixture
def make_s3(place: Place) -> MakeS3:
    """make_s3(**settings) -> a store over the test's own place."""

    def make(**changes: object) -> S3BlobStore:
        return S3BlobStore(place.url, s3_settings(place.server, **changes))

    return make
