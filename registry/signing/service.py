"""Rules of signing: which keys a tenant trusts, what its policy asks of a push, and what a signature is worth.

A push is judged when it comes, by the keys and the policy of that moment; versions from before stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError

from registry.audit import service as audit
from registry.db import ReadSession, WriteSession, database_time
from registry.errors import Conflict, Forbidden, NotFound
from registry.signing import repository
from registry.signing.bundle import Bundle, PublicKey, refuse
from registry.signing.models import OFF, POLICIES, REQUIRE, SigningKey, SigningPolicy
from registry.signing.schemas import PolicyIn, PolicyOut, SigningKeyIn
from registry.tenants.auth import TenantSubject

MAX_KEYS = 200


@dataclass(frozen=True)
class TrustedKey:
    """A key of the tenant, as it was when it was read."""

    key_id: str
    name: str
    public_key: PublicKey
    is_revoked: bool


@dataclass(frozen=True)
class Trust:
    """What a push is judged by: the policy in force, and every key, revoked ones too."""

    policy: str
    keys: tuple[TrustedKey, ...]


def trust_of(session: ReadSession, tenant_id: str) -> Trust:
    return trust_under(session, tenant_id, effective=policy_of(session, tenant_id).effective)


def trust_under(session: ReadSession, tenant_id: str, *, effective: str) -> Trust:
    """Where the policy in force is known already."""
    if effective == OFF:
        return Trust(effective, ())
    rows = repository.list_keys(session, tenant_id)
    keys = (TrustedKey(row.id, row.name, PublicKey.parse(row.public_key), row.revoked_at is not None) for row in rows)
    return Trust(effective, tuple(keys))


def judge(trust: Trust, files: Mapping[str, str], signature: bytes | None) -> TrustedKey | None:
    """The key that vouches for a push, or None where nobody has to.

    `files`: path -> sha256 of all that is pushed beside the signature. Raises Invalid where the policy is not satisfied.
    """
    if trust.policy == OFF or (signature is None and trust.policy != REQUIRE):
        return None
    if signature is None:
        remedy = "push with `lorary adapters push --sign KEYFILE`, or add the file that `model_signing sign key` writes"
        raise refuse("signature_required", "this tenant takes signed adapters only", remedy=remedy)
    bundle = Bundle.parse(signature)
    key = _signer(trust, bundle)
    bundle.require_files(files)
    return key


def require_trusted(session: WriteSession, tenant_id: str, key: TrustedKey) -> None:
    """Again when the version is recorded: the bytes were read before this transaction."""
    if repository.lock(session, tenant_id, key.key_id).revoked_at is not None:
        raise _revoked(key.name)


def add_key(session: WriteSession, subject: TenantSubject, wanted: SigningKeyIn) -> SigningKey:
    """Raises Invalid for what is no such key, Conflict for a name or a key that is or was there."""
    public = PublicKey.parse(wanted.public_key)
    _refuse_twin(session, subject, wanted.name, public)
    if repository.count(session, subject.tenant_id) >= MAX_KEYS:
        raise Conflict(f"this tenant has {MAX_KEYS} signing keys already", field="name", remedy="ask the operators")
    key = SigningKey(
        tenant_id=subject.tenant_id,
        name=wanted.name,
        public_key=public.pem,
        fingerprint=public.fingerprint,
        curve=public.curve,
        created_by=subject.key_id,
    )
    try:
        with session.begin_nested():
            session.add(key)
    except IntegrityError as error:
        raise Conflict(f"a signing key {wanted.name!r} was added a moment ago", field="name", value=wanted.name) from error
    session.refresh(key)
    _audit(session, subject, "signing_key.added", key)
    return key


def revoke_key(session: WriteSession, subject: TenantSubject, name: str) -> None:
    """Idempotent. Pushes are no longer taken on its word, and versions that it vouches for show that it is revoked."""
    key = repository.find(session, subject.tenant_id, name)
    if key is None:
        remedy = "GET /api/v1/signing-keys"
        raise NotFound(f"there is no signing key named {name!r}", field="name", value=name, remedy=remedy, code="signing_key_not_found")
    if key.revoked_at is None:
        key.revoked_at, key.revoked_by = database_time(session), subject.key_id
        _audit(session, subject, "signing_key.revoked", key)


def policy_of(session: ReadSession, tenant_id: str) -> PolicyOut:
    row = repository.policy(session, tenant_id)
    if row is None:
        return PolicyOut(policy=OFF, floor=OFF, effective=OFF, updated_at=None, updated_by=None)
    effective = stricter(row.policy, row.floor)
    return PolicyOut.model_validate(
        {
            "policy": row.policy,
            "floor": row.floor,
            "effective": effective,
            "updated_at": row.updated_at,
            "updated_by": row.updated_by,
        }
    )


def stricter(policy: str, floor: str) -> str:
    return max(policy, floor, key=POLICIES.index)


def set_policy(session: WriteSession, subject: TenantSubject, wanted: PolicyIn) -> PolicyOut:
    """Raises Forbidden where a tenant's key names the floor, Conflict where it chooses less than the floor."""
    before = policy_of(session, subject.tenant_id)
    if wanted.floor is not None and not subject.is_admin:
        raise Forbidden("floor is set by operators", field="floor", value=wanted.floor, remedy="send policy alone")
    policy, floor = wanted.policy or before.policy, wanted.floor or before.floor
    if wanted.policy is not None and POLICIES.index(policy) < POLICIES.index(floor):
        raise Conflict(
            f"policy {policy!r} asks for less than {floor!r}, which the operators require of this tenant",
            field="policy",
            value=policy,
            remedy=f"choose {floor!r} or more",
            code="policy_floor",
        )
    _write_policy(session, subject, policy=policy, floor=floor)
    after = policy_of(session, subject.tenant_id)
    shown = {"policy", "floor"}
    audit.record(
        session,
        subject,
        "signing_policy.changed",
        "tenant",
        subject.tenant_id,
        before=before.model_dump(include=shown),
        after=after.model_dump(include=shown),
        tenant_id=subject.tenant_id,
    )
    return after


def _write_policy(session: WriteSession, subject: TenantSubject, *, policy: str, floor: str) -> None:
    row = repository.policy(session, subject.tenant_id)
    if row is None:
        row = SigningPolicy(tenant_id=subject.tenant_id, policy=policy, floor=floor, updated_by=subject.key_id)
        try:
            with session.begin_nested():
                session.add(row)
        except IntegrityError as error:
            raise Conflict(
                "the policy was set by another request a moment ago", field="policy", value=policy, remedy="try again"
            ) from error
    else:
        row.policy, row.floor, row.updated_by = policy, floor, subject.key_id
    session.flush()
    session.refresh(row)


def _signer(trust: Trust, bundle: Bundle) -> TrustedKey:
    """By the fingerprint that the bundle gives; an old bundle gives none, and every key is asked."""
    named = [key for key in trust.keys if not bundle.hint or key.public_key.fingerprint == bundle.hint]
    found = next((key for key in named if bundle.is_by(key.public_key)), None)
    if found is None and named and bundle.hint:
        problem = f"it names the key {named[0].name!r}, which did not make it"
        raise refuse("signature_invalid", problem, value=bundle.hint, remedy="sign the files again")
    if found is None:
        problem = f"it was made by a key that this tenant does not trust ({bundle.hint or 'it does not say which'})"
        remedy = "register the public key with `lorary signing-keys add NAME FILE`"
        raise refuse("signature_key_unknown", problem, value=bundle.hint, remedy=remedy)
    if found.is_revoked:
        raise _revoked(found.name)
    return found


def _revoked(name: str) -> Exception:
    remedy = "sign again with a key that `lorary signing-keys list` shows as good"
    return refuse("signature_key_revoked", f"it was made by the key {name!r}, which is revoked", value=name, remedy=remedy)


def _refuse_twin(session: ReadSession, subject: TenantSubject, name: str, public: PublicKey) -> None:
    twin = repository.twin(session, subject.tenant_id, name=name, fingerprint=public.fingerprint)
    if twin is None:
        return
    state = "is revoked, and a revoked key never comes back" if twin.revoked_at is not None else "is there already"
    remedy = "choose another name" if twin.fingerprint != public.fingerprint else "make another key pair"
    field = "name" if twin.fingerprint != public.fingerprint else "public_key"
    raise Conflict(
        f"the signing key {twin.name!r} {state}; {remedy}", field=field, value=twin.name, remedy=remedy, code="signing_key_exists"
    )


def _audit(session: WriteSession, subject: TenantSubject, action: str, key: SigningKey) -> None:
    after = {"name": key.name, "fingerprint": key.fingerprint}
    audit.record(session, subject, action, "signing_key", key.id, after=after, tenant_id=subject.tenant_id)
