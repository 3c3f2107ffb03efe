"""What the upload endpoints take and show."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

UploadId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="Id of an upload in parts.")]
PartNumber = Annotated[int, Path(ge=1, le=10_000, description="Parts are numbered from 1.")]
UploadState = Literal["open", "finalising", "done", "rejected", "aborted", "expired"]


class UploadIn(BaseModel):
    """The blob to come."""

    model_config = ConfigDict(extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=1, le=2**53)


class PartOut(BaseModel):
    number: int
    size: int


class UploadOut(BaseModel):
    """Every part has `part_bytes` but the last one. `reason` is {code, detail} of a rejected upload."""

    id: str
    sha256: str
    size: int
    part_bytes: int
    num_parts: int
    state: UploadState
    reason: dict[str, Any] | None
    job_id: str | None
    created_at: dt.datetime
    expires_at: dt.datetime


class UploadProgress(UploadOut):
    """With the parts that have arrived, while it is open."""

    parts: list[PartOut]


class PartsIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    numbers: list[Annotated[int, Field(ge=1, le=10_000)]] = Field(min_length=1, max_length=100)


class PartTarget(BaseModel):
    """Where to PUT one part of `size` bytes. A `url` that begins with / is the registry's own and takes the API key;
    any other one carries its own right and must not be sent the key."""

    number: int
    size: int
    url: str


class PartTargets(BaseModel):
    items: list[PartTarget]
