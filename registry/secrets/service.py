"""Rules of secrets: sealed before they reach the session, opened only by the code that uses them."""

from __future__ import annotations

from sqlalchemy.exc import IntegrityError

from registry.audit import service as audit
from registry.db import ReadSession, WriteSession
from registry.errors import Conflict, Invalid, NotFound
from registry.sealing import Sealer, Unsealable
from registry.secrets import repository
from registry.secrets.models import TenantSecret
from registry.tenants.auth import TenantSubject

MAX_SECRETS = 100


def context(tenant_id: str, name: str) -> str:
    """What a sealed secret is bound to."""
    return f"tenant-secret/{tenant_id}/{name}"


def put(session: WriteSession, subject: TenantSubject, name: str, *, value: str, sealer: Sealer) -> tuple[TenantSecret, bool]:
    """Set or replace; True where it is new. Raises Conflict when the tenant has too many."""
    sealed = sealer.seal(value, context=context(subject.tenant_id, name))
    secret = repository.find(session, subject.tenant_id, name)
    if secret is None:
        _leave_room(session, subject)
        secret = TenantSecret(tenant_id=subject.tenant_id, name=name, sealed=sealed, updated_by=subject.key_id)
        try:
            with session.begin_nested():
                session.add(secret)
        except IntegrityError:  # somebody else set it at the same moment: ours is the later one
            secret = repository.find(session, subject.tenant_id, name)
            assert secret is not None, "the name was taken a moment ago"
        else:
            _tell(session, subject, secret, before=None)
            return secret, True
    before = {"name": name, "updated_by": secret.updated_by}
    secret.sealed, secret.updated_by = sealed, subject.key_id
    _tell(session, subject, secret, before=before)
    return secret, False


def _tell(session: WriteSession, subject: TenantSubject, secret: TenantSecret, *, before: dict[str, str] | None) -> None:
    session.flush()
    session.refresh(secret)
    action, after = "secret.created" if before is None else "secret.replaced", {"name": secret.name, "updated_by": secret.updated_by}
    audit.record(session, subject, action, "secret", secret.id, before=before, after=after, tenant_id=subject.tenant_id)


def _leave_room(session: ReadSession, subject: TenantSubject) -> None:
    if repository.count(session, subject.tenant_id) >= MAX_SECRETS:
        raise Conflict(f"this tenant has {MAX_SECRETS} secrets already", field="name", remedy="delete one that nothing uses")


def delete(session: WriteSession, subject: TenantSubject, name: str) -> None:
    secret = repository.find(session, subject.tenant_id, name)
    if secret is None:
        raise _not_found(name)
    session.delete(secret)
    audit.record(session, subject, "secret.deleted", "secret", secret.id, before={"name": name}, tenant_id=subject.tenant_id)


def value_of(session: ReadSession, tenant_id: str, name: str, *, sealer: Sealer) -> str:
    """The secret itself, for code that acts for the tenant. Raises NotFound; Invalid where no key of ours opens it."""
    secret = repository.find(session, tenant_id, name)
    if secret is None:
        raise _not_found(name)
    try:
        return sealer.open(secret.sealed, context=context(tenant_id, name))
    except Unsealable as error:
        raise Invalid(
            f"the secret {name!r} cannot be decrypted any more", field="secret", value=name, remedy="set it again", code="secret_unreadable"
        ) from error


def _not_found(name: str) -> NotFound:
    return NotFound(
        f"there is no secret named {name!r}", field="name", value=name, remedy="see `GET /api/v1/secrets`", code="secret_not_found"
    )
