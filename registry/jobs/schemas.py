"""JSON out of jobs. Payloads stay inside: they are between the enqueuer and the worker."""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class JobOut(BaseModel):
    """`error` is {code, detail}; of a queued job it is the reason of the last attempt."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    kind: str
    adapter: str | None
    state: JobState
    attempt: int
    max_attempts: int
    cancel_requested: bool
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    created_at: dt.datetime
    updated_at: dt.datetime
    finished_at: dt.datetime | None


class JobEventOut(BaseModel):
    """Something that happened to a job. `data` is the progress, or the error or result of a change of state."""

    model_config = ConfigDict(from_attributes=True)

    number: int
    type: Literal["state", "progress"]
    state: JobState
    attempt: int
    data: dict[str, Any] | None
    created_at: dt.datetime


class JobEvents(BaseModel):
    """Events in order. `after` is the cursor of the next poll; `ended`: there will be no more."""

    items: list[JobEventOut]
    after: int
    ended: bool
