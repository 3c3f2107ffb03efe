"""A test's own part of the S3 bucket, seen past the store, and the settings to reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic import SecretStr

from registry.config import S3Settings
from tests.servers import S3_ADMIN, S3_BUCKET, S3Server


def s3_settings(server: S3Server, **changes: object) -> S3Settings:
    options: dict[str, object] = {
        "endpoint_url": server.endpoint_url,
        "access_key_id": S3_ADMIN[0],
        "secret_access_key": SecretStr(S3_ADMIN[1]),
        "connect_timeout_s": 2,
        "read_timeout_s": 20,
    }
    return S3Settings(**(options | changes))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Place:
    """The part of the bucket that belongs to one test, seen past the store."""

    server: S3Server
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{S3_BUCKET}/{self.prefix}"

    def put(self, key: str, data: bytes) -> None:
        self.server.client.put_object(Bucket=S3_BUCKET, Key=f"{self.prefix}/{key}", Body=data)

    def head(self, key: str) -> dict[str, Any]:
        return dict(self.server.client.head_object(Bucket=S3_BUCKET, Key=f"{self.prefix}/{key}"))

    def keys(self) -> list[str]:
        found = self.server.client.list_objects_v2(Bucket=S3_BUCKET, Prefix=f"{self.prefix}/").get("Contents", ())
        return [item["Key"].removeprefix(f"{self.prefix}/") for item in found]

    def multiparts(self) -> int:
        found = self.server.client.list_multipart_uploads(Bucket=S3_BUCKET, Prefix=f"{self.prefix}/")
        return len(found.get("Uploads", ()))


def make_place(server: S3Server) -> Place:
    return Place(server, f"test/{uuid4().hex}")
