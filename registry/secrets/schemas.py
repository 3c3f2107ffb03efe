"""JSON in and out of secrets. The value goes in alone."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from registry.text import Name

MAX_VALUE_LENGTH = 8192

SecretName = Annotated[Name, Path()]


class SecretIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: SecretStr = Field(min_length=1, max_length=MAX_VALUE_LENGTH)


class SecretOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    name: str
    created_at: dt.datetime
    updated_at: dt.datetime
    updated_by: str
