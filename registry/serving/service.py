"""Rules of serving: who may register and report, what a request is allowed to reach, which replica answers it.

Every rule is checked against the database anew for each request, pull and heartbeat; nothing is cached, so that a
revoked key or a deleted adapter stops at once even where its bytes are resident.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from registry.adapters.service import Reference, parse_reference
from registry.audit.service import record
from registry.config import Settings
from registry.db import ReadSession, WriteSession
from registry.errors import Forbidden, Invalid, NotFound
from registry.quotas.rates import RateLimits, Reservation
from registry.quotas.service import effective
from registry.serving import names, repository
from registry.serving.grants import GrantSigner
from registry.serving.models import Replica
from registry.serving.names import Served
from registry.serving.repository import Address
from registry.tenants.auth import Subject, TenantSubject
from registry.wire import FormDescription, GrantClaims, Heartbeat, HeartbeatReply, ReplicaRegistration, ReplicaWelcome, ResolveRequest

FORGET_SILENT_S = 3600.0


@dataclass(frozen=True)
class Authorised:
    """One request that may run: whose it is, what the client called the model, and what that name means now."""

    tenant_id: str
    model: str
    served: Served


# ---- inference ----


def authorise(session: ReadSession, subject: TenantSubject, model: str) -> Authorised:
    """What `model` means for this tenant now, by one indexed query. Raises NotFound `model_not_found`.

    Absent, deleted, not ready and another tenant's are told apart by nothing.
    """
    try:
        reference = parse_reference(model)
    except Invalid:
        _model_not_found(model)
    served = _find(session, subject.tenant_id, reference, bare="@" not in model)
    if served is None or not _may_use(subject, served):
        _model_not_found(model)
    return Authorised(tenant_id=subject.tenant_id, model=model, served=served)


def _find(session: ReadSession, tenant_id: str, reference: Reference, *, bare: bool) -> Served | None:
    if bare:
        return names.find_bare(session, tenant_id, name=reference.name)
    if reference.number is not None:
        return names.find_version(session, tenant_id, name=reference.name, number=reference.number)
    assert reference.alias is not None, "a reference has a number or an alias"
    return names.find_alias(session, tenant_id, name=reference.name, alias=reference.alias)


def _may_use(subject: TenantSubject, served: Served) -> bool:
    """Base models are everybody's; adapters those that the key is not kept from."""
    return served.name is None or subject.may_name(served.name)


def _model_not_found(model: str) -> NoReturn:
    raise NotFound(
        f"the model {model[:200]!r} does not exist or you do not have access to it",
        code="model_not_found",
        field="model",
        remedy="see `GET /v1/models`",
    )


def choose_replica(session: ReadSession, authorised: Authorised, *, ttl_s: float, tried: Collection[str] = ()) -> Address | None:
    """The live replica for a request: resident first (pool, host, disk), then the shortest queue. None if there is none."""
    return repository.choose_replica(
        session,
        authorised.tenant_id,
        base_model_id=authorised.served.base_model_id,
        form_digest=authorised.served.form_digest,
        rank=authorised.served.rank,
        ttl_s=ttl_s,
        tried=tried,
    )


def rate_limits(authorised: Authorised, settings: Settings) -> RateLimits:
    """Of the tenant, for one request; without a statement."""
    served = authorised.served
    return RateLimits(
        requests=effective(served.requests_per_minute, settings.quota_requests_per_minute),
        tokens=effective(served.tokens_per_minute, settings.quota_tokens_per_minute),
    )


def grant_for(
    authorised: Authorised,
    address: Address,
    *,
    request_id: str,
    key_id: str,
    reservation: Reservation | None,
    signer: GrantSigner,
    settings: Settings,
) -> str:
    """A signed grant of this request for that replica, good once and for `grant_ttl_s`."""
    now = int(time.time())
    held = {} if reservation is None else {"minute": reservation.minute, "reserved_tokens": reservation.tokens}
    claims = GrantClaims(
        aud=address.replica_id,
        jti=request_id,
        iat=now,
        exp=now + max(1, round(settings.grant_ttl_s)),
        tenant=authorised.tenant_id,
        model=authorised.model,
        version_digest=authorised.served.version_digest,
        form_digest=authorised.served.form_digest,
        max_tokens=max_tokens_of(authorised, settings),
        key_id=key_id,
        **held,
    )
    return signer.sign(claims)


def max_tokens_of(authorised: Authorised, settings: Settings) -> int:
    """No more than the tenant has in a minute."""
    tokens = rate_limits(authorised, settings).tokens
    return settings.max_request_tokens if tokens is None else max(1, min(settings.max_request_tokens, tokens))


def list_models(session: ReadSession, subject: TenantSubject) -> list[Served]:
    return [served for served in names.list_served(session, subject.tenant_id) if _may_use(subject, served)]


# ---- replicas ----


def replica_only(subject: Subject) -> None:
    """Raises Forbidden unless the key is a replica's own. A tenant's key never is, whatever its scopes say."""
    subject.must_have("replica")
    if subject.tenant_id is not None:
        raise Forbidden("a replica's key belongs to no tenant", field="scope", value="replica", remedy="use a key made for replicas")


def register(
    session: WriteSession, subject: Subject, registration: ReplicaRegistration, *, signer: GrantSigner, settings: Settings
) -> ReplicaWelcome:
    """Idempotent by (key, url). Raises Invalid `unknown_base_model` for a base digest that no ready base model has."""
    replica_only(subject)
    base_model = repository.find_base_model(session, base_digest=registration.base_digest)
    if base_model is None:
        raise Invalid(
            f"no ready base model has the digest {registration.base_digest}",
            code="unknown_base_model",
            field="base_digest",
            value=registration.base_digest,
            remedy="register the base model that this replica serves, or start the replica with one of `GET /api/v1/base-models`",
        )
    repository.forget_silent_replicas(session, silent_s=max(FORGET_SILENT_S, settings.replica_ttl_s))
    replica = repository.register(session, registration, key_id=subject.key_id, base_model_id=base_model.id)
    after = {"url": replica.url, "base_model": base_model.name}
    record(session, subject, "replica.registered", "replica", replica.id, after=after)
    return ReplicaWelcome(
        replica_id=replica.id,
        base_model=base_model.name,
        heartbeat_interval_s=settings.heartbeat_interval_s,
        grant_public_keys=signer.public_keys,
        grant_leeway_s=settings.grant_leeway_s,
    )


def heartbeat(
    session: WriteSession, subject: Subject, report: Heartbeat, *, replica_id: str, signer: GrantSigner, settings: Settings
) -> HeartbeatReply:
    """Records a report, unless a later one was recorded before. Raises NotFound: the replica must register (again)."""
    own_replica(session, subject, replica_id)
    if repository.record_heartbeat(session, report, replica_id=replica_id):
        repository.replace_residents(session, report.residents, replica_id=replica_id)
    return HeartbeatReply(
        heartbeat_interval_s=settings.heartbeat_interval_s,
        grant_public_keys=signer.public_keys,
        drop=tuple(repository.unwanted_residents(session, replica_id=replica_id)),
    )


def own_replica(session: ReadSession, subject: Subject, replica_id: str) -> Replica:
    replica_only(subject)
    replica = repository.get_replica(session, replica_id, key_id=subject.key_id)
    if replica is None:
        raise NotFound(f"no replica {replica_id} was registered with this key", code="unknown_replica", remedy="register first")
    return replica


def resolve(session: ReadSession, subject: Subject, asked: ResolveRequest, *, claims: GrantClaims) -> FormDescription:
    """What the form consists of. `claims` are those of the live grant that came with it.

    Raises Forbidden if the grant is for another replica, tenant or form; NotFound if the adapter is gone by now.
    """
    if (asked.tenant, asked.form_digest) != (claims.tenant, claims.form_digest):
        raise _wrong_grant("it is for another adapter")
    form = _granted_form(session, subject, claims)
    return FormDescription(
        tenant=asked.tenant,
        version_digest=form.version_digest,
        form_digest=asked.form_digest,
        base_digest=form.base_digest,
        manifest=form.manifest,
    )


def may_pull(session: ReadSession, subject: Subject, sha256: str, *, claims: GrantClaims) -> None:
    """Raises like `resolve`, and NotFound for a blob that is no part of the granted form."""
    form = _granted_form(session, subject, claims)
    if sha256 not in _blobs_of(form.manifest):
        raise NotFound(f"blob {sha256} is no part of the form that the grant names", field="sha256", value=sha256)


def _granted_form(session: ReadSession, subject: Subject, claims: GrantClaims) -> repository.LiveForm:
    replica_only(subject)
    if repository.get_replica(session, claims.aud, key_id=subject.key_id) is None:
        raise _wrong_grant("it is addressed to another replica")
    if claims.version_digest is None or claims.form_digest is None:
        raise _wrong_grant("it is for the base model, which has nothing to pull")
    form = repository.find_live_form(session, claims.tenant, version_digest=claims.version_digest, form_digest=claims.form_digest)
    if form is None:
        raise NotFound(f"the form {claims.form_digest} is not served any more", code="form_gone", field="form_digest")
    return form


def _blobs_of(manifest: dict[str, Any]) -> set[str]:
    return {blob["sha256"] for blob in manifest["blobs"].values()}


def _wrong_grant(reason: str) -> Forbidden:
    return Forbidden(f"the grant does not allow this: {reason}", code="grant_refused", field="grant")
