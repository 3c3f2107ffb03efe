"""What `/usage` takes and shows."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum

from pydantic import BaseModel, Field


class Group(StrEnum):
    """What sums are kept apart by; by tenant always."""

    TENANT = "tenant"
    DAY = "day"
    ADAPTER = "adapter"
    KEY = "key"


class UsageRow(BaseModel):
    """Sums over what the groups have in common; a group that was not asked for is null.

    `requests` are all of them, also the `cancelled` (the client left) and the `failed` ones. A row has an `adapter`, or the
    `base_model` that answered alone.
    """

    day: dt.date | None
    tenant: str
    adapter: str | None
    base_model: str | None
    key_id: str | None
    requests: int
    cancelled: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


class UsagePage(BaseModel):
    since: dt.date = Field(description="First day of UTC.")
    until: dt.date = Field(description="Last day, included.")
    items: list[UsageRow]
    next_cursor: str | None = None
