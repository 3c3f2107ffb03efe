"""Who a request comes from and what it may do: `Subject`, and the dependencies that every endpoint uses.

    Subject          any valid key                  SubjectDep      a valid key, whatever its scopes
    TenantSubject    a subject inside one tenant    require(scope)  -> TenantSubject;  allow(scope) -> Subject

An admin key acts inside the tenant that the header X-Lorary-Tenant names.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Annotated

import structlog
from fastapi import Depends, Header, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from registry.db import Database, ReadSession, reach_system, reach_tenant
from registry.errors import BadRequest, Forbidden, NotFound, Unauthenticated
from registry.tenants import repository
from registry.tenants.keys import ADMIN, REPLICA, SCOPES, KeyHasher, key_id_of
from registry.tenants.limits import Prefixes, is_within
from registry.threads import in_thread
from registry.wire import TENANT_HEADER

_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="An API key, `lry_...`.")


@dataclass(frozen=True)
class Subject:
    """An authenticated caller. `tenant_id` and `tenant` (its name) are None for operators' and replicas' keys.

    `adapter_prefixes`: how the names begin of the adapters that exist for it; None: every adapter of the tenant.
    """

    key_id: str
    tenant_id: str | None
    tenant: str | None
    scopes: frozenset[str]
    expires_at: dt.datetime | None = None
    adapter_prefixes: Prefixes = None

    @property
    def is_admin(self) -> bool:
        return ADMIN in self.scopes

    def has(self, scope: str) -> bool:
        """`admin` implies every scope but `replica`: only a replica's own key may resolve and pull."""
        return scope in self.scopes or (self.is_admin and scope != REPLICA)

    def must_have(self, *scopes: str) -> None:
        """One of them is enough."""
        if not any(self.has(scope) for scope in scopes):
            wanted = " or ".join(scopes)
            raise Forbidden(
                f"this key lacks the scope {wanted}",
                field="scope",
                value=scopes[0],
                remedy=f"use a key that has {wanted}; `GET /api/v1/whoami` lists what this one has",
            )

    def may_name(self, adapter: str) -> bool:
        """False: for this key there is no such adapter, whether or not it exists."""
        return is_within(adapter, self.adapter_prefixes)

    def must_name(self, adapter: str, *, field: str = "name") -> None:
        """For what would make the adapter. Raises Forbidden, whether or not it exists."""
        if not self.may_name(adapter):
            assert self.adapter_prefixes is not None, "an unlimited key names every adapter"
            raise Forbidden(
                f"this key is limited to adapters whose names begin with {' or '.join(self.adapter_prefixes)}, unlike {adapter!r}",
                field=field,
                value=adapter,
                remedy="choose such a name, or use a key without this limit",
                code="outside_prefixes",
            )

    def must_be_unlimited(self, what: str) -> None:
        """Raises Forbidden for a key that is limited to some adapters; `what` tells of all of them."""
        if self.adapter_prefixes is not None:
            raise Forbidden(
                f"this key is limited to some adapters, and {what} is about all of them",
                field="adapter_prefixes",
                value=", ".join(self.adapter_prefixes),
                remedy="use a key without this limit",
                code="key_limited",
            )

    def in_tenant(self) -> TenantSubject:
        if self.tenant_id is None or self.tenant is None:
            raise BadRequest(
                f"this key belongs to no tenant, so the header {TENANT_HEADER} must name one",
                field=TENANT_HEADER,
                remedy=f"send {TENANT_HEADER}: <tenant name> or use a key of the tenant",
            )
        return TenantSubject(
            key_id=self.key_id,
            tenant_id=self.tenant_id,
            tenant=self.tenant,
            scopes=self.scopes,
            expires_at=self.expires_at,
            adapter_prefixes=self.adapter_prefixes,
        )


@dataclass(frozen=True)
class TenantSubject(Subject):
    """A subject that acts inside one tenant, its own or the one that an admin named."""

    tenant_id: str
    tenant: str


SYSTEM = Subject(key_id="system", tenant_id=None, tenant=None, scopes=frozenset())


class KeyRefused(Unauthenticated):
    """A well-formed key that does not open. The caller hears one sentence for all reasons; the audit log hears why."""

    def __init__(self, *, key_id: str, reason: str, known: bool, tenant_id: str | None = None) -> None:
        super().__init__(
            "this API key is unknown, revoked or expired", field="Authorization", remedy="ask the owner of the tenant for a new key"
        )
        self.key_id = key_id
        self.reason = reason
        self.known = known
        self.tenant_id = tenant_id


def authenticate(session: ReadSession, token: str, hasher: KeyHasher) -> Subject:
    """The subject of a token, by one indexed query. Raises Unauthenticated; a bad checksum is refused before the query."""
    try:
        key_id = key_id_of(token)
    except ValueError as error:
        raise Unauthenticated(
            f"the API key cannot be read: {error}", field="Authorization", remedy="send `Authorization: Bearer lry_...`, unchanged"
        ) from error
    row = repository.key_for_authentication(session, key_id)
    matches = hasher.matches(token, row.token_hmac if row else None)
    if row is None or not matches:
        reason, tenant_id = ("wrong_secret", row.tenant_id) if row else ("unknown", None)
        raise KeyRefused(key_id=key_id, reason=reason, known=row is not None, tenant_id=tenant_id)
    if row.refusal is not None:
        raise KeyRefused(key_id=key_id, reason=row.refusal, known=True, tenant_id=row.tenant_id)
    return Subject(
        key_id=key_id,
        tenant_id=row.tenant_id,
        tenant=row.tenant,
        scopes=frozenset(row.scopes),
        expires_at=row.expires_at and row.expires_at.astimezone(dt.UTC),
        adapter_prefixes=None if row.adapter_prefixes is None else tuple(row.adapter_prefixes),
    )


def bearer_token(request: Request) -> str:
    """The token of the Authorization header. Raises Unauthenticated when there is none."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("no API key was sent", field="Authorization", remedy="send `Authorization: Bearer lry_...`")
    return token.strip()


def remember(request: Request, subject: Subject) -> None:
    """Name the subject in logs, in the audit of refusals and in the key's last use. Call it after `authenticate`."""
    request.state.subject = subject
    request.app.state.last_used.seen(subject.key_id)
    structlog.contextvars.bind_contextvars(key_id=subject.key_id, tenant=subject.tenant)


def _enter_tenant(session: ReadSession, subject: Subject, name: str | None) -> Subject:
    if name is None or name == subject.tenant:
        return subject
    if not subject.is_admin:
        raise Forbidden(
            f"this key may not act inside another tenant; {TENANT_HEADER} is for admin keys",
            field=TENANT_HEADER,
            value=name,
            remedy=f"leave {TENANT_HEADER} out",
        )
    tenant = repository.tenant_by_name(session, name)
    if tenant is None:
        raise NotFound(f"tenant {name!r} does not exist", field=TENANT_HEADER, value=name, remedy="see `GET /api/v1/tenants`")
    return replace(subject, tenant_id=tenant.id, tenant=tenant.name)


async def current_subject(
    request: Request,
    _documented: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    tenant_name: Annotated[str | None, Header(alias=TENANT_HEADER, description="Admin keys only: act inside this tenant.")] = None,
) -> Subject:
    """Async so that what it binds for the logs outlives it: a thread's context is a copy."""
    token = bearer_token(request)
    database: Database = request.app.state.database

    def look_up() -> tuple[Subject, Subject | Forbidden | NotFound]:
        with database.system_read() as session:
            subject = authenticate(session, token, request.app.state.key_hasher)
            try:
                return subject, _enter_tenant(session, subject, tenant_name)
            except (Forbidden, NotFound) as refusal:
                return subject, refusal

    subject, entered = await in_thread(look_up)
    if not isinstance(entered, Subject):
        remember(request, subject)
        raise entered
    remember(request, entered)
    if entered.tenant_id is not None:
        reach_tenant(entered.tenant_id)
    return entered


SubjectDep = Annotated[Subject, Depends(current_subject)]


def allow(*scopes: str) -> Callable[..., Awaitable[Subject]]:
    """A dependency: a key with one of the scopes; `tenant_id` is None for an admin who named no tenant.

    Operators' work, and whatever belongs to no tenant, crosses tenants; the rest stays in the subject's.
    """
    assert SCOPES.issuperset(scopes), f"{scopes} are not scopes"

    async def allowed(subject: SubjectDep) -> Subject:
        subject.must_have(*scopes)
        if ADMIN in scopes or subject.tenant_id is None:
            reach_system()
        return subject

    return allowed


def require(scope: str) -> Callable[..., Awaitable[TenantSubject]]:
    """A dependency: a key with `scope` inside one tenant; 400 for an admin who named none."""
    assert scope in SCOPES, f"{scope} is not a scope"

    async def required(subject: SubjectDep) -> TenantSubject:
        subject.must_have(scope)
        return subject.in_tenant()

    return required
