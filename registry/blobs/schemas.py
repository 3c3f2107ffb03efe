"""What the blob endpoints take and show."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel

Sha256Path = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="Lowercase hex sha256 of the bytes.")]


class BlobOut(BaseModel):
    sha256: str
    size: int
    created_at: dt.datetime
