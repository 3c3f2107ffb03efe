"""One bucket of an S3-compatible store: its client, its keys, and what its errors mean to us.

Keys are `<prefix>/<tenant_id>/<sha256>` for blobs and `<prefix>/<tenant_id>/uploads/<upload_id>` for what is on its way.
A client is safe for any number of threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import boto3
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

from registry.artifact.digest import is_digest
from registry.config import S3Settings
from registry.errors import StorageFull, Unavailable

log = structlog.get_logger(__name__)

UPLOADS = "uploads"
OUTAGE_RETRY_AFTER_S = 2
REFUSAL_RETRY_AFTER_S = 30

_REFUSALS = frozenset(
    "403 AccessDenied InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken NoSuchBucket AllAccessDisabled".split()
)
_FULL = frozenset("507 InsufficientCapacity InsufficientStorage QuotaExceeded XMinioStorageFull".split())
_TENANT_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_UPLOAD_ID = re.compile(r"[0-9a-f]{32}")


class KeyMissing(Exception):
    """There is no such object, or no such multipart upload."""


class KeyTaken(Exception):
    """A conditional write met an object that is there already."""


class S3Bucket:
    """Raises ValueError for a URL that names no bucket."""

    def __init__(self, url: str, options: S3Settings) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc):
            raise ValueError(f"LORARY_BLOB_URL {url!r} names no bucket; write s3://bucket or s3://bucket/prefix")
        self.name = parts.netloc
        prefix = parts.path.strip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.encryption = _encryption(options)
        self.client = _client(options, endpoint_url=options.endpoint_url)
        public = options.public_endpoint_url
        self.signer = _client(options, endpoint_url=public) if public else self.client

    def blob_key(self, tenant_id: str, sha256: str) -> str:
        assert is_digest(sha256), f"{sha256!r} is no sha256: endpoints check it by pattern"
        return f"{self._tenant(tenant_id)}{sha256}"

    def upload_key(self, tenant_id: str, upload_id: str) -> str:
        assert _UPLOAD_ID.fullmatch(upload_id), f"{upload_id!r} is no upload id: callers pass ids of rows"
        return f"{self._tenant(tenant_id)}{UPLOADS}/{upload_id}"

    def tenant_prefix(self, tenant_id: str | None) -> str:
        return self.prefix if tenant_id is None else self._tenant(tenant_id)

    def parse_key(self, key: str) -> tuple[str, str] | None:
        """(tenant_id, sha256) of a blob's key; None for every other one."""
        tenant_id, _, sha256 = key.removeprefix(self.prefix).partition("/")
        return (tenant_id, sha256) if is_digest(sha256) and _TENANT_ID.fullmatch(tenant_id) else None

    def is_upload_key(self, key: str) -> bool:
        parts = key.removeprefix(self.prefix).split("/")
        return len(parts) == 3 and parts[1] == UPLOADS and _UPLOAD_ID.fullmatch(parts[2]) is not None

    def call(self, operation: str, key: str, **arguments: Any) -> Any:
        """One operation on one key, its errors translated."""
        with answers():
            return getattr(self.client, operation)(Bucket=self.name, Key=key, **arguments)

    def pages(self, operation: str, **arguments: Any) -> Iterator[Any]:
        """The pages of a listing, its errors translated."""
        with answers():
            yield from self.client.get_paginator(operation).paginate(Bucket=self.name, **arguments)

    def presign(self, operation: str, key: str, *, ttl_s: int, **arguments: Any) -> str:
        """A URL that carries the right to one operation. Needs no connection."""
        with answers():
            url: str = self.signer.generate_presigned_url(operation, Params={"Bucket": self.name, "Key": key, **arguments}, ExpiresIn=ttl_s)
            return url

    def _tenant(self, tenant_id: str) -> str:
        assert _TENANT_ID.fullmatch(tenant_id), f"{tenant_id!r} is no tenant id: callers pass ids, never user input"
        return f"{self.prefix}{tenant_id}/"


@contextmanager
def answers() -> Iterator[None]:
    """Turns what boto3 raises into KeyMissing, KeyTaken, StorageFull or Unavailable."""
    try:
        yield
    except ClientError as error:
        raise _translated(error) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise _refused("no credentials", error) from error
    except ParamValidationError:
        raise  # our own mistake
    except BotoCoreError as error:
        log.warning("blob_store.away", error=str(error))
        raise Unavailable("the blob store does not answer", retry_after_s=OUTAGE_RETRY_AFTER_S, remedy="try again soon") from error


def _translated(error: ClientError) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _REFUSALS or status == 403:
        return _refused(code, error)
    if status == 404:
        return KeyMissing(code)
    if status == 412:
        return KeyTaken(code)
    if code in _FULL or status == 507:
        return StorageFull("the blob store is full and nothing of this upload was kept", remedy="ask the operator, then upload again")
    log.warning("blob_store.failed", code=code, status=status, error=str(error))
    return Unavailable(f"the blob store could not do it ({code})", retry_after_s=OUTAGE_RETRY_AFTER_S, remedy="try again soon")


def _refused(code: str, error: Exception) -> Unavailable:
    """An operator's mistake, which a tenant can only wait for."""
    log.error("blob_store.refused", code=code, error=str(error))
    return Unavailable(
        f"the blob store refuses this registry ({code}); its operator must check the bucket and the keys",
        retry_after_s=REFUSAL_RETRY_AFTER_S,
        remedy="operators: check LORARY_BLOB_URL and the LORARY_S3_* or AWS_* credentials",
        code="blob_store_refused",
    )


def _client(options: S3Settings, *, endpoint_url: str) -> Any:
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": options.addressing_style},
        retries={"mode": "standard", "total_max_attempts": options.max_attempts},
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=options.max_connections,
        # other stores than Amazon's know neither boto3's trailing checksums nor how to send them back
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    secret = options.secret_access_key.get_secret_value()
    return _session().client(
        "s3",
        endpoint_url=endpoint_url or None,
        region_name=options.region or None,
        aws_access_key_id=options.access_key_id or None,  # None: boto3's own chain (AWS_*, web identity, instance)
        aws_secret_access_key=secret or None,
        config=config,
    )


@cache
def _session() -> Any:
    """One a process: it reads megabytes of descriptions of the API."""
    return boto3.session.Session()


def _encryption(options: S3Settings) -> dict[str, str]:
    """Arguments of every call that makes an object."""
    if not options.encryption:
        return {}
    key = {"SSEKMSKeyId": options.kms_key_id} if options.kms_key_id else {}
    return {"ServerSideEncryption": options.encryption, **key}
