"""A key's successor: the same rights under a new secret, while the old one still works for the overlap."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from registry.config import Settings
from registry.db import WriteSession, database_time
from registry.errors import Conflict, Invalid
from registry.tenants import repository
from registry.tenants.auth import Subject
from registry.tenants.keys import KeyHasher
from registry.tenants.models import ApiKey
from registry.tenants.rights import check_expiry, check_grantable, expiry_of
from registry.tenants.schemas import KeyRotationIn
from registry.tenants.service import Recorder, described, get_key, issue_key


@dataclass(frozen=True)
class Rotation:
    """`token` is the successor's, told this once."""

    successor: ApiKey
    token: str
    predecessor: ApiKey


def rotate_key(
    session: WriteSession, *, subject: Subject, key_id: str, wanted: KeyRotationIn, hasher: KeyHasher, settings: Settings, record: Recorder
) -> Rotation:
    """Raises NotFound; Conflict for a key that is no longer good or was rotated already; Forbidden for more than the subject has."""
    overlap_s = _overlap(wanted, settings)
    key = repository.lock_key(session, get_key(session, subject, key_id).id)
    now = database_time(session)
    _must_be_current(key, now)
    check_grantable(subject, key.scopes)
    successor, token = issue_key(
        session,
        subject=subject,
        tenant_id=key.tenant_id,
        name=key.name,
        scopes=key.scopes,
        adapter_prefixes=key.adapter_prefixes,
        expires_at=_expiry(session, subject, key, wanted),
        hasher=hasher,
        record=record,
    )
    before, ends_at = described(key), now + dt.timedelta(seconds=overlap_s)
    key.successor_id = successor.id
    key.expires_at = ends_at if key.expires_at is None else min(ends_at, key.expires_at)
    session.flush()
    after = {**described(key), "successor_id": successor.id}
    record(session, subject, "key.rotated", "key", key.id, before=before, after=after, tenant_id=key.tenant_id)
    return Rotation(successor, token, key)


def _overlap(wanted: KeyRotationIn, settings: Settings) -> int:
    longest = settings.max_key_rotation_overlap_s
    if wanted.overlap_s is None:
        return min(settings.key_rotation_overlap_s, longest)
    if wanted.overlap_s > longest:
        raise Invalid(
            f"overlap_s {wanted.overlap_s} is over the {longest} seconds that this installation allows",
            field="overlap_s",
            value=wanted.overlap_s,
            remedy=f"at most {longest}",
        )
    return wanted.overlap_s


def _must_be_current(key: ApiKey, now: dt.datetime) -> None:
    if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise Conflict(f"key {key.id} is revoked or expired", field="id", value=key.id, remedy="create a new key", code="key_over")
    if key.successor_id is not None:
        raise Conflict(
            f"key {key.id} was rotated already; its successor is {key.successor_id}",
            field="id",
            value=key.id,
            remedy=f"rotate or revoke {key.successor_id}",
            code="key_rotated",
        )


def _expiry(session: WriteSession, subject: Subject, key: ApiKey, wanted: KeyRotationIn) -> dt.datetime | None:
    if wanted.expires_in_s is not None:
        return expiry_of(session, subject, wanted.expires_in_s)
    check_expiry(subject, key.expires_at, value=None)
    return key.expires_at
