"""What the serving endpoints show beyond the wire contract: replicas for operators, model cards for OpenAI clients."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import BaseModel, Field


class ReplicaOut(BaseModel):
    """One replica as it last reported. `live` is what `choose_replica` goes by."""

    id: str
    url: str
    base_model: str
    state: Literal["registered", "ready", "draining"]
    live: bool
    max_rank: int
    num_pages: int
    page_bytes: int
    num_queued: int
    num_running: int
    num_free_pages: int
    num_residents: int
    registered_at: dt.datetime
    heartbeat_at: dt.datetime | None


class ModelCard(BaseModel):
    """OpenAI's model object. `parent` is null for a base model; `root` of an adapter is the version digest it names now."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds.")
    owned_by: str
    root: str
    parent: str | None = None


class ModelList(BaseModel):
    """OpenAI's list object; as there, never paginated."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
