"""What the endpoints of garbage collection take and show."""

from __future__ import annotations

import datetime as dt
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from registry.jobs.schemas import JobState


class CollectionIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dry_run: bool = Field(default=False, strict=True, description="Count what would go, and remove nothing.")


class CollectionOut(BaseModel):
    """One collection, which is a job. `report` is what it has counted so far, at its end all of it."""

    job_id: str
    state: JobState
    dry_run: bool
    report: dict[str, Any] | None
    error: dict[str, Any] | None
    created_at: dt.datetime
    finished_at: dt.datetime | None
