"""JSON in and out of tenants and API keys."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from registry.tenants.keys import SCOPES
from registry.text import Name, Text

ScopeName = Annotated[Text, Field(json_schema_extra={"enum": sorted(SCOPES)})]


AdapterPrefixes = Annotated[
    list[Name],
    Field(min_length=1, max_length=32, description="Limit the key to adapters whose names begin with one of these."),
]


class TenantIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name


class TenantOut(BaseModel):
    """`purge_requested_at`: its bytes are given up, and it cannot be restored."""

    id: str
    name: str
    created_at: dt.datetime
    deleted_at: dt.datetime | None
    purge_requested_at: dt.datetime | None


class KeyIn(BaseModel):
    """`expires_in_s` None never expires; it may not outlive the key that asks. `adapter_prefixes` None: any adapter."""

    model_config = ConfigDict(extra="forbid")

    name: Text = Field(min_length=1, max_length=100, description="What it is for; shown in listings.")
    scopes: list[ScopeName] = Field(min_length=1, max_length=len(SCOPES))
    adapter_prefixes: AdapterPrefixes | None = None
    expires_in_s: int | None = Field(default=None, ge=1, le=10 * 366 * 86400)


class KeyOut(BaseModel):
    id: str
    name: str
    tenant: str | None
    scopes: list[str]
    adapter_prefixes: list[str] | None
    created_at: dt.datetime
    created_by: str | None
    expires_at: dt.datetime | None
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None
    successor_id: str | None


class KeyCreated(KeyOut):
    token: str = Field(description="The key itself, shown this once.")


class KeyRotationIn(BaseModel):
    """Left out, `overlap_s` is the installation's default, and the successor expires when the key would have."""

    model_config = ConfigDict(extra="forbid")

    overlap_s: int | None = Field(default=None, ge=0, description="How long the old key still works; 0: not at all.")
    expires_in_s: int | None = Field(default=None, ge=1, le=10 * 366 * 86400)


class KeyRotated(KeyCreated):
    """The successor. The key that it replaces stops at `predecessor_expires_at`."""

    predecessor_id: str
    predecessor_expires_at: dt.datetime


class WhoAmI(BaseModel):
    key_id: str
    tenant: str | None
    scopes: list[str]
    adapter_prefixes: list[str] | None
    expires_at: dt.datetime | None
