"""The HTTP contract between registry and replicas, versioned. Pydantic only: both houses import it.

A peer that speaks another `WIRE_VERSION` is answered 409 `wire_version` and told both numbers, so that a rolling
upgrade fails loudly and at once instead of half-understanding. Every message therefore says its version, and the
receiver checks it (`require_wire_version`) before it looks at any other field.

`tenant` is always the tenant's id, never its name: an id is not used twice, so a deleted tenant's caches can never
meet a new tenant of the same name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

WIRE_VERSION = 2

GRANT_HEADER = "X-Lorary-Grant"
REQUEST_ID_HEADER = "X-Request-Id"
CLIENT_REQUEST_ID_HEADER = "X-Client-Request-Id"  # in answers: what the caller gave as X-Request-Id
DEADLINE_HEADER = "X-Lorary-Deadline-Ms"
VERSION_DIGEST_HEADER = "X-Lorary-Version-Digest"
FORM_DIGEST_HEADER = "X-Lorary-Form-Digest"
TENANT_HEADER = "X-Lorary-Tenant"  # an admin key acts inside this tenant

REPLICAS_PATH = "/api/v1/replicas"
RESOLVE_PATH = "/api/v1/resolve"
PULL_PATH = "/api/v1/pull"
STATE_PATH = "/debug/state"  # of a replica
USAGE_PATH = "/api/v1/replicas/{replica_id}/usage"

GRANT_ALGORITHM = "EdDSA"
GRANT_ISSUER = "lorary"

MAX_RESIDENTS = 16_384  # a heartbeat stays near 2 MiB; a replica that holds more reports the nearest ones

MAX_FINISHED = 500  # a usage report stays near half a MiB
MAX_GRANT_LENGTH = 4096

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
TenantId = Annotated[str, Field(min_length=1, max_length=32)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class WireVersionMismatch(ValueError):
    """The peer speaks another version of this contract, or does not say which."""

    def __init__(self, theirs: object) -> None:
        super().__init__(f"wire_version is {theirs!r} and this side speaks {WIRE_VERSION}; run the same Lorary version on both")
        self.theirs = theirs


def require_wire_version(message: object) -> None:
    """Raises WireVersionMismatch unless `message` (decoded JSON) says that it speaks our version."""
    theirs = message.get("wire_version") if isinstance(message, dict) else None
    if theirs != WIRE_VERSION:
        raise WireVersionMismatch(theirs)


class WireModel(BaseModel):
    """Frozen, and closed: an unknown key is a version mismatch that nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wire_version: int = WIRE_VERSION


class ReplicaRegistration(WireModel):
    """POST /api/v1/replicas, with a key of scope `replica`. Idempotent by (key, url)."""

    url: str = Field(max_length=512, pattern=r"^https?://[^/?#@\s]+/?$", description="Where the registry reaches this replica.")
    base_digest: Sha256
    max_rank: int = Field(ge=1, lt=2**31)
    num_pages: int = Field(ge=1, lt=2**53)
    page_bytes: int = Field(ge=1, lt=2**53)


class ReplicaWelcome(WireModel):
    """Answer to a registration: who you are, how to check grants, how often to report."""

    replica_id: str
    base_model: str
    heartbeat_interval_s: float
    grant_public_keys: tuple[str, ...] = Field(description="PEM, newest first; a grant signed by any of them is good.")
    grant_leeway_s: float = Field(description="Clock skew allowed between the registry and the replica.")


class Resident(BaseModel):
    """One adapter that a replica holds, and how near it is to the kernels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: TenantId
    form_digest: Sha256
    tier: Literal["pool", "host", "disk"]


class Heartbeat(WireModel):
    """POST /api/v1/replicas/{replica_id}/heartbeat. `sequence` grows; an older one than the last is ignored.

    The first heartbeat after a registration makes the replica live; "draining" takes it out of choice at once.
    """

    sequence: int = Field(ge=0, lt=2**63)
    state: Literal["ready", "draining"]
    num_queued: Count
    num_running: Count
    num_free_pages: Count
    residents: tuple[Resident, ...] = Field(default=(), max_length=MAX_RESIDENTS)


class HeartbeatReply(WireModel):
    """`drop` names what the registry no longer wants served: the replica unloads it and forgets it on disk."""

    heartbeat_interval_s: float
    grant_public_keys: tuple[str, ...]
    drop: tuple[Resident, ...] = ()


class FinishedRequest(BaseModel):
    """What became of one request, said by the replica that had its grant, in the words of that grant.

    `finished`: answered to the end; `cancelled`: the client left; `failed`: everything else. Tokens are those that were
    answered or could still have been read: the prompt counts from the first generated token on. A request that was
    turned away with 503 before it began is not reported: the front door knows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    grant: str = Field(max_length=MAX_GRANT_LENGTH)
    outcome: Literal["finished", "cancelled", "failed"]
    num_prompt_tokens: Count
    num_completion_tokens: Count
    age_s: float = Field(ge=0, lt=1e9, description="How long ago it ended: hosts' clocks need not agree.")


class UsageReport(WireModel):
    """POST /api/v1/replicas/{replica_id}/usage. Sent again until it is answered; each request counts once, by the grant's `jti`."""

    requests: tuple[FinishedRequest, ...] = Field(min_length=1, max_length=MAX_FINISHED)


class UsageReply(WireModel):
    """All of the report is settled: `num_known` had been before, `num_refused` carried no grant that this replica may settle."""

    num_counted: int
    num_known: int
    num_refused: int


class ResolveRequest(WireModel):
    """POST /api/v1/resolve: what are the bytes of this form? Needs a `replica` key and a live grant for the form."""

    tenant: TenantId
    form_digest: Sha256
    grant: str


class FormDescription(WireModel):
    """What a replica needs to pull and load one form.

    `manifest` is the form's manifest as `registry.artifact.manifest` defines it: the replica recomputes the form
    digest from it, and each blob's sha256 from the bytes of /api/v1/pull/{sha256} (same key, grant in the header),
    so that nothing between the pusher and the pool is believed unseen.
    """

    tenant: TenantId
    version_digest: Sha256
    form_digest: Sha256
    base_digest: Sha256
    manifest: dict[str, Any]


class InspectionClaims(BaseModel):
    """The JWT with which the registry asks one replica for its `/debug/state`, once, for an admin key.

    Closed like GrantClaims and unlike it in its fields, so that neither can be taken for the other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    iss: Literal["lorary"] = "lorary"
    aud: str
    jti: str
    iat: int
    exp: int
    act: Literal["inspect"] = "inspect"


class GrantClaims(BaseModel):
    """The JWT (EdDSA) that the front door puts on one request to one replica.

    `jti` is the request id (the registry draws it, a client cannot choose it) and is accepted once; `aud` is
    the replica id. `form_digest` None means the base model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    iss: Literal["lorary"] = "lorary"
    aud: str
    jti: str
    iat: int
    exp: int
    tenant: TenantId
    model: str = Field(description="The name that the client used; echoed in the reply.")
    version_digest: Sha256 | None = None
    form_digest: Sha256 | None = None
    max_tokens: int = Field(ge=1, description="Upper limit on max_tokens of this request.")
    key_id: str = Field(max_length=32, description="Whose request it is, for the usage report.")
    minute: int = Field(default=0, ge=0, description="The minute in which tokens are reserved for it.")
    reserved_tokens: int = Field(default=0, ge=0, description="How many; 0 where the tenant has no limit.")
