"""JSON in and out of signing keys and policies."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal, Self

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.text import Name, Text

MAX_KEY_LENGTH = 4096

SigningKeyName = Annotated[Name, Path()]
Policy = Literal["off", "verify_if_present", "require"]


class SigningKeyIn(BaseModel):
    """`public_key`: PEM of an elliptic-curve key on P-256, P-384 or P-521, as `openssl ec -pubout` writes it."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    public_key: Text = Field(min_length=1, max_length=MAX_KEY_LENGTH)


class SigningKeyOut(BaseModel):
    """`fingerprint`: sha256 of `public_key` as it stands here, which is what a signature names its key by."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    fingerprint: str
    curve: str
    public_key: str
    created_at: dt.datetime
    created_by: str
    revoked_at: dt.datetime | None
    revoked_by: str | None


class PolicyIn(BaseModel):
    """What is left out stays. `floor` is for operators: the least that this tenant may choose."""

    model_config = ConfigDict(extra="forbid")

    policy: Policy | None = None
    floor: Policy | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("nothing to change; send policy, or floor with an admin key")
        return self


class PolicyOut(BaseModel):
    """`effective` is the stricter of the tenant's `policy` and the operators' `floor`. It judges pushes from now on."""

    policy: Policy
    floor: Policy
    effective: Policy
    updated_at: dt.datetime | None
    updated_by: str | None


class SignatureOut(BaseModel):
    """What a version's signature is worth.

    `unsigned`: it has none. `unchecked`: it has one that nobody judged, because the policy was `off`. `verified`: it covers
    exactly the version's files, by the named key. `key_revoked`: so it was, but the tenant has revoked the key since.
    """

    verdict: Literal["unsigned", "unchecked", "verified", "key_revoked"]
    key: str | None = None
    fingerprint: str | None = None
    verified_at: dt.datetime | None = None
    key_revoked_at: dt.datetime | None = None
