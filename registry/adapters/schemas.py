"""What the adapter endpoints take and show."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal, Self

from fastapi import Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.adapters.search import Search
from registry.base_models.schemas import Failure
from registry.signing.schemas import SignatureOut
from registry.text import Name, Spelled, Text

AdapterName = Annotated[Name, Path()]
_ALIAS = Spelled(
    "^(?=.{1,63}$)([a-z]|[0-9]+[a-z._-])[a-z0-9._-]*$",
    "an alias is spelled like an adapter's name, but not with digits alone: `name@3` is version 3",
)
AliasName = Annotated[str, _ALIAS, Path()]
VersionNumber = Annotated[int, Path(ge=1, le=2**31 - 1)]
FilePath = Annotated[str, Path(max_length=256)]

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Description = Annotated[Text, Field(max_length=4096)]
MAX_TAGS = 32
Tag = Annotated[Text, Field(min_length=1, max_length=64)]
Tags = Annotated[list[Tag], Field(max_length=MAX_TAGS, description="Labels such as `team:red` or `draft`.")]
Status = Literal["pending", "ready", "rejected"]


def search_of(
    *,
    q: Annotated[Text | None, Query(max_length=200, description="Words, or their beginnings, of name, description or tags.")] = None,
    tag: Annotated[list[Tag], Query(max_length=MAX_TAGS, description="`key:value`, or a key alone. Repeat for several.")] = [],  # noqa: B006
    base_model: Annotated[Text | None, Query(max_length=63, description="Of this base model.")] = None,
    status: Annotated[Status | None, Query(description="With a version in this state.")] = None,
    min_rank: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="With a version of this rank or above.")] = None,
    max_rank: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="With a version of this rank or below.")] = None,
) -> Search:
    """The query of a listing."""
    return Search(text=q, tags=tuple(tag), base_model=base_model, status=status, min_rank=min_rank, max_rank=max_rank)


SearchDep = Annotated[Search, Depends(search_of)]


class PushIn(BaseModel):
    """A version, by the digests of blobs that were uploaded before. `files` maps path to sha256."""

    model_config = ConfigDict(extra="forbid")

    files: dict[Text, Sha256] = Field(min_length=1, max_length=16)
    base_model: Text | None = Field(default=None, max_length=63, description="Needed where adapter_config.json does not name one of ours.")
    description: Description | None = None
    tags: Tags | None = None


class AdapterPatch(BaseModel):
    """What is left out stays. `tags` replaces all of them; `add_tags` and `remove_tags` leave the others alone."""

    model_config = ConfigDict(extra="forbid")

    description: Description | None = None
    tags: Tags | None = None
    add_tags: Tags | None = None
    remove_tags: Tags | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.tags is not None and (self.add_tags is not None or self.remove_tags is not None):
            raise ValueError("tags replaces all tags; send it, or add_tags and remove_tags")
        return self


class FileOut(BaseModel):
    path: str
    sha256: str
    size: int


class FormOut(BaseModel):
    kind: str
    form_digest: str
    size_bytes: int


class VersionOut(BaseModel):
    """`restorable_until`: from then on a deleted version may be purged (null: never); `purged_at`: its bytes are given up."""

    adapter: str
    number: int
    version_digest: str
    status: Literal["pending", "ready", "rejected", "deleted"]
    reason: Failure | None
    base_model: str
    rank: int
    targets: list[str]
    num_params: int
    size_bytes: int
    files: list[FileOut]
    forms: list[FormOut]
    signature: SignatureOut
    created_at: dt.datetime
    created_by: str
    deleted_at: dt.datetime | None
    restorable_until: dt.datetime | None
    purged_at: dt.datetime | None


class PurgeOut(BaseModel):
    """Numbers of the versions whose bytes were given up by this request."""

    purged: list[int]


class PushOut(VersionOut):
    """`job_id` names the validation that this push started, or null when there was nothing to do."""

    job_id: str | None


class CardPusher(BaseModel):
    """`key_name` is null where the key is no longer, or is an operator's."""

    key_id: str
    key_name: str | None


class CardImport(BaseModel):
    """`endpoint` null: the Hugging Face Hub. `commit` is what `revision` was at that time."""

    endpoint: str | None
    repo: str
    revision: str
    commit: str
    imported_at: dt.datetime


class CardBaseModel(BaseModel):
    name: str
    base_digest: str | None
    upstream_names: list[str]


class CardReadme(BaseModel):
    """What the tenant wrote. `text` replaces what is no UTF-8; the file itself is at `/files/README.md`, byte for byte."""

    sha256: str
    size: int
    text: str


class CardOut(BaseModel):
    """What Lorary knows of a version, and beside it, unchecked, the README that came with it."""

    adapter: str
    description: str
    tags: list[str]
    license: str | None
    number: int
    version_digest: str
    status: Literal["pending", "ready", "rejected"]
    reason: Failure | None
    aliases: list[str]
    pushed_by: CardPusher
    pushed_at: dt.datetime
    imported_from: CardImport | None
    base_model: CardBaseModel
    rank: int
    alpha: float | None
    use_rslora: bool | None
    targets: list[str]
    dtype: str | None
    num_params: int
    size_bytes: int
    files: list[FileOut]
    forms: list[FormOut]
    signature: SignatureOut
    readme: CardReadme | None


class AdapterOut(BaseModel):
    name: str
    base_model: str
    description: str
    tags: list[str]
    num_versions: int
    latest_version: int | None
    aliases: dict[str, int] = Field(description="Alias to version number.")
    created_at: dt.datetime
    updated_at: dt.datetime
    deleted_at: dt.datetime | None
    restorable_until: dt.datetime | None = Field(description="From then on a deleted adapter may be purged; null: never.")


class Link(BaseModel):
    """One thing that a version came from or was made into; `kind` says what `id` is the id of."""

    relation: str = Field(examples=["pushed_by", "imported_from", "made_for", "has_form"])
    kind: str = Field(examples=["key", "hub_commit", "base_model", "form"])
    id: str
    at: dt.datetime | None
    details: dict[str, Any]


class LineageOut(BaseModel):
    adapter: str
    number: int
    version_digest: str
    came_from: list[Link]
    made_into: list[Link]


class AliasIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(strict=True, ge=1, le=2**31 - 1)


class AliasOut(BaseModel):
    """`generation` is also the ETag."""

    alias: str
    version: int
    version_digest: str
    generation: int
    updated_at: dt.datetime
    updated_by: str


class AliasMoveOut(BaseModel):
    """`version` is null where the alias was removed."""

    generation: int
    version: int | None
    moved_at: dt.datetime
    moved_by: str
