"""What crosses HTTP in the Hub's spelling, camelCase where the Hub has it so."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.text import Name

REPO_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"


class SiblingLfs(BaseModel):
    sha256: str
    size: int
    pointer_size: int = Field(serialization_alias="pointerSize")


class Sibling(BaseModel):
    rfilename: str
    size: int
    blob_id: str = Field(serialization_alias="blobId")
    lfs: SiblingLfs


class CardData(BaseModel):
    base_model: str
    library_name: Literal["peft"] = "peft"
    tags: list[str]


class ModelOut(BaseModel):
    """One commit of one repository. `sha` is the commit: the first 40 digits of `version_digest`."""

    id: str
    model_id: str = Field(serialization_alias="modelId")
    author: str
    sha: str
    version: int
    version_digest: str
    created_at: dt.datetime = Field(serialization_alias="createdAt")
    last_modified: dt.datetime = Field(serialization_alias="lastModified")
    private: Literal[True] = True
    gated: Literal[False] = False
    disabled: Literal[False] = False
    downloads: int = 0
    likes: int = 0
    library_name: Literal["peft"] = "peft"
    pipeline_tag: Literal["text-generation"] = "text-generation"
    tags: list[str]
    card_data: CardData = Field(serialization_alias="cardData")
    siblings: list[Sibling]
    used_storage: int = Field(serialization_alias="usedStorage")


class TreeLfs(BaseModel):
    oid: str
    size: int
    pointer_size: int = Field(serialization_alias="pointerSize")


class TreeEntry(BaseModel):
    """`oid` is git's id of the LFS pointer, `lfs.oid` the sha256 of the bytes."""

    type: Literal["file"] = "file"
    path: str
    oid: str
    size: int
    lfs: TreeLfs


class AccessToken(BaseModel):
    display_name: str = Field(serialization_alias="displayName")
    role: Literal["read"] = "read"


class Auth(BaseModel):
    type: Literal["access_token"] = "access_token"
    access_token: AccessToken = Field(serialization_alias="accessToken")


class WhoamiOut(BaseModel):
    """The key's tenant as a user of the Hub; an operator's key without a tenant goes by its own id."""

    type: Literal["user"] = "user"
    id: str
    name: str
    fullname: str
    is_pro: Literal[False] = Field(default=False, serialization_alias="isPro")
    orgs: list[str] = []
    auth: Auth


class ImportIn(BaseModel):
    """An adapter of another hub. `token_secret` names a secret of the tenant that holds a token for that hub."""

    model_config = ConfigDict(extra="forbid")

    repo: str = Field(pattern=REPO_PATTERN, max_length=96, description="namespace/name")
    revision: str = Field(default="main", pattern="^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=128, description="Branch, tag or commit.")
    name: Name | None = Field(default=None, description="The adapter to push to; the repository's own name if absent.")
    base_model: str | None = Field(default=None, max_length=63, description="Needed where adapter_config.json does not name one of ours.")
    endpoint: str | None = Field(default=None, max_length=256, description="Another hub, one of those that the operator lists.")
    token_secret: Name | None = None


class ImportAccepted(BaseModel):
    """`job_id` tells how it goes: its result is {outcome: imported, adapter, number} or {outcome: refused, code, detail}."""

    job_id: str
    adapter: str
    repo: str
    revision: str
