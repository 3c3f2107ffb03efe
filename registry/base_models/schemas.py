"""What the base-model endpoints take and show."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.text import Name, Text


class Source(BaseModel):
    """Where the weights come from.

    `directory`: an absolute path, served in place. `gguf`: an absolute path of one file, converted once.
    `package`: an installed distribution or module that ships exactly one `.gguf` file; it is never imported.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["directory", "gguf", "package"]
    location: Text = Field(min_length=1, max_length=1024)


class BaseModelIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name
    source: Source
    upstream_names: list[Annotated[Text, Field(min_length=1, max_length=256)]] = Field(
        default=[], max_length=32, description="Other names by which adapter configs may call this model."
    )


class Failure(BaseModel):
    """Why something did not become ready: a stable code and one sentence."""

    code: str
    detail: str


class BaseModelOut(BaseModel):
    """`source`, `location` and `reason` tell paths on the operator's machines, so only admin keys see them."""

    name: str
    status: Literal["pending", "ready", "failed"]
    reason: Failure | None
    base_digest: str | None
    source: Source | None
    location: str | None
    upstream_names: list[str]
    spec: dict[str, Any] | None
    created_at: dt.datetime


class BaseModelAccepted(BaseModelOut):
    """`job_id` is null when there was nothing to do."""

    job_id: str | None
