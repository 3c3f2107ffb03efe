"""JSON in and out of webhooks."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.outbound_policy import MAX_URL_LENGTH
from registry.webhooks.models import WebhookDelivery

EventType = Literal[
    "*",
    "adapter.created",
    "adapter.updated",
    "adapter.deleted",
    "adapter.restored",
    "version.created",
    "version.ready",
    "version.rejected",
    "version.revalidated",
    "version.deleted",
    "alias.moved",
    "key.created",
    "key.revoked",
    "key.rotated",
    "signing_key.added",
    "signing_key.revoked",
    "signing_policy.changed",
]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=30, description="`*` means every type.")]
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL_LENGTH)]
Description = Annotated[str, Field(max_length=500)]
DeliveryState = Literal["pending", "delivered", "failed"]


class WebhookIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: Url
    event_types: EventTypes
    description: Description = ""


class WebhookPatch(BaseModel):
    """What is left out stays. `enabled: true` takes up deliveries where they stopped."""

    model_config = ConfigDict(extra="forbid")

    url: Url | None = None
    event_types: EventTypes | None = None
    description: Description | None = None
    enabled: bool | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("nothing to change; send url, event_types, description or enabled")
        return self


class RotationIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    overlap_s: int = Field(default=86_400, ge=0, le=30 * 86_400, description="How long the old secret signs too.")


class WebhookOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    url: str
    description: str
    event_types: list[str]
    enabled: bool
    disabled_reason: str | None
    previous_until: dt.datetime | None
    created_at: dt.datetime
    created_by: str


class WebhookCreated(WebhookOut):
    """`secret` is in this answer and never again: `whsec_` and base64, as Standard Webhooks libraries take it."""

    secret: str


class DeliveryOut(BaseModel):
    """`event_id` is the `webhook-id` that the receiver sees. `attempts` are the latest, oldest first."""

    id: str
    event_id: str
    event_type: str
    state: DeliveryState
    attempt: int
    attempts: list[dict[str, Any]]
    next_attempt_at: dt.datetime | None
    created_at: dt.datetime
    finished_at: dt.datetime | None

    @classmethod
    def of(cls, row: WebhookDelivery) -> Self:
        return cls(
            id=row.id,
            event_id=row.event_id,
            event_type=row.event.type,
            state=row.state,
            attempt=row.attempt,
            attempts=row.log,
            next_attempt_at=row.available_at if row.state == "pending" else None,
            created_at=row.created_at,
            finished_at=row.finished_at,
        )
