"""What a key may hand on: never more scopes, more adapters or a later end than it has itself."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection

from registry.db import ReadSession, database_time
from registry.errors import Forbidden, Invalid
from registry.tenants.auth import Subject
from registry.tenants.keys import ADMIN, PLATFORM_SCOPES, SCOPES, TENANT_SCOPES
from registry.tenants.limits import TENANT_WIDE_SCOPES, covers
from registry.tenants.models import ApiKey


def check_scopes(scopes: Collection[str], *, in_tenant: bool) -> None:
    unknown = sorted(set(scopes) - SCOPES)
    if unknown:
        raise Invalid(
            f"scope {unknown[0]!r} does not exist", field="scopes", value=unknown[0], remedy=f"choose among {', '.join(sorted(SCOPES))}"
        )
    if in_tenant and (wrong := sorted(PLATFORM_SCOPES & set(scopes))):
        raise Invalid(
            f"scope {wrong[0]!r} belongs to no tenant",
            field="scopes",
            value=wrong[0],
            remedy="create this key with an admin key and without naming a tenant",
        )
    if not in_tenant and (wrong := sorted(TENANT_SCOPES & set(scopes))):
        raise Invalid(
            f"scope {wrong[0]!r} needs a tenant", field="scopes", value=wrong[0], remedy="name the tenant in the header X-Lorary-Tenant"
        )


def check_grantable(subject: Subject, scopes: Collection[str]) -> None:
    """An admin may hand out `replica` without having it; nobody else may hand out what they lack."""
    missing = sorted(scope for scope in scopes if not (subject.has(scope) or ADMIN in subject.scopes))
    if missing:
        raise Forbidden(
            f"this key cannot grant {missing[0]}, which it lacks", field="scopes", value=missing[0], remedy=f"leave {missing[0]} out"
        )


def expiry_of(session: ReadSession, subject: Subject, expires_in_s: int | None) -> dt.datetime | None:
    """When a key that `subject` makes stops. Raises Forbidden for later than its own."""
    wanted = None if expires_in_s is None else database_time(session) + dt.timedelta(seconds=expires_in_s)
    check_expiry(subject, wanted, value=expires_in_s)
    return wanted


def check_expiry(subject: Subject, wanted: dt.datetime | None, *, value: object) -> None:
    if subject.expires_at is not None and (wanted is None or wanted > subject.expires_at):
        raise Forbidden(
            f"this key expires at {subject.expires_at.isoformat()} and cannot make one that outlives it",
            field="expires_in_s",
            value=value,
            remedy="ask for an earlier expiry",
        )


def check_prefixes(subject: Subject, prefixes: Collection[str] | None, *, scopes: Collection[str]) -> None:
    """Raises Invalid for a limit that means nothing, Forbidden for one that is wider than the subject's own."""
    if prefixes is not None and subject.tenant_id is None:
        raise Invalid(
            "a key without a tenant has no adapters to be limited to", field="adapter_prefixes", remedy="leave adapter_prefixes out"
        )
    if prefixes is not None and (wrong := sorted(TENANT_WIDE_SCOPES & set(scopes))):
        raise Invalid(
            f"scope {wrong[0]} hears of every adapter of the tenant, so a key with adapter_prefixes cannot have it",
            field="scopes",
            value=wrong[0],
            remedy=f"leave {wrong[0]} or adapter_prefixes out",
        )
    if not covers(subject.adapter_prefixes, prefixes):
        own = ", ".join(subject.adapter_prefixes or ())
        raise Forbidden(
            f"this key is limited to adapters that begin with {own} and cannot make a wider one",
            field="adapter_prefixes",
            value=None if prefixes is None else ", ".join(prefixes),
            remedy=f"name prefixes that begin with {own}",
        )


def may_manage(subject: Subject, key: ApiKey) -> bool:
    """A limited key sees, revokes and rotates the keys that it could have made, as far as adapters go."""
    return covers(subject.adapter_prefixes, key.adapter_prefixes)
