"""What the base-model endpoints take and show."""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.text import Name, Text

_WORD = "[A-Za-z0-9][A-Za-z0-9._-]*"
HUB_LOCATION = f"(?=[^@]{{1,96}}(@|$)){_WORD}/{_WORD}(@[A-Za-z0-9][A-Za-z0-9._/-]{{0,127}})?"


class Source(BaseModel):
    """Where the weights come from.

    `directory`: an absolute path, served in place. `gguf`: an absolute path of one file, converted once.
    `package`: an installed distribution or module that ships exactly one `.gguf` file; it is never imported.
    `hub`: `org/name` or `org/name@revision` of the Hugging Face Hub, or of `endpoint`. `token_secret` names a secret, with a
    token for that hub, of the tenant in X-Lorary-Tenant.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["directory", "gguf", "package", "hub"]
    location: Text = Field(min_length=1, max_length=1024)
    endpoint: Text | None = Field(default=None, max_length=256)
    token_secret: Name | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind != "hub" and (self.endpoint is not None or self.token_secret is not None):
            raise ValueError(f"endpoint and token_secret belong to a source of kind hub, not {self.kind}")
        if self.kind == "hub" and re.fullmatch(HUB_LOCATION, self.location) is None:
            raise ValueError("location of a hub is org/name or org/name@revision")
        return self

    def given(self) -> dict[str, Any]:
        """As it is kept: without what was left out."""
        return self.model_dump(exclude_none=True)


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
