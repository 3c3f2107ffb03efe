"""What can be limited, and how limits are said over HTTP."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Measure(StrEnum):
    """What is counted. The value is the name of the column, the JSON field and, after `LORARY_QUOTA_`, the setting."""

    BYTES = "bytes"
    ADAPTERS = "adapters"
    VERSIONS = "versions_per_day"
    JOBS = "running_jobs"
    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"


LimitIn = Annotated[int, Field(strict=True, ge=0, lt=2**53)] | Literal["unlimited"] | None


class QuotaPatch(BaseModel):
    """New limits; what is left out stays. null: the operator's default. 0: nothing at all."""

    model_config = ConfigDict(extra="forbid")

    bytes: LimitIn = Field(default=None, description="Of blobs, also those whose upload in parts has begun.")
    adapters: LimitIn = None
    versions_per_day: LimitIn = Field(default=None, description="Versions that are made in a day of UTC.")
    running_jobs: LimitIn = Field(default=None, description="Jobs that run at the same time; more wait. 0: none ever runs.")
    requests_per_minute: LimitIn = Field(default=None, description="Inference requests.")
    tokens_per_minute: LimitIn = Field(default=None, description="Prompt and completion tokens together.")


class MeasureOut(BaseModel):
    """One limit and what counts against it."""

    limit: int | None = Field(description="null: no limit.")
    source: Literal["tenant", "default"] = Field(description="Whether the tenant has a limit of its own.")
    used: int
    reserved: int = Field(default=0, description="Promised to what has begun, beside `used`.")


class QuotaOut(BaseModel):
    tenant: str
    bytes: MeasureOut
    adapters: MeasureOut
    versions_per_day: MeasureOut
    running_jobs: MeasureOut
    requests_per_minute: MeasureOut
    tokens_per_minute: MeasureOut
