"""What may be named as a hub to read from. The endpoint decides where a worker connects to, and who is shown a token."""

from __future__ import annotations

from dataclasses import dataclass

from registry.base_models.schemas import Source
from registry.config import Settings
from registry.db import ReadSession
from registry.errors import Invalid
from registry.secrets import repository as secrets
from registry.tenants.auth import Subject

MAIN = "main"


@dataclass(frozen=True)
class HubLocation:
    """`org/name` or `org/name@revision`; without a revision `main`."""

    repo: str
    revision: str

    @classmethod
    def parse(cls, location: str) -> HubLocation:
        repo, _, revision = location.partition("@")
        return cls(repo, revision or MAIN)


def require_listed(endpoint: str | None, *, settings: Settings) -> None:
    """None is the Hugging Face Hub. Raises Invalid for any other that the operator does not list."""
    if endpoint is not None and endpoint not in settings.hub_endpoints:
        raise Invalid(
            "endpoint is none of the hubs that this installation imports from; leave it out for the Hugging Face Hub",
            field="endpoint",
            value=endpoint,
            remedy="ask the operator to list it in LORARY_HUB_ENDPOINTS, and write it as it stands there",
            code="endpoint_not_allowed",
        )


def require_secret(session: ReadSession, tenant_id: str, name: str | None) -> None:
    if name is not None and secrets.find(session, tenant_id, name) is None:
        raise Invalid(
            f"there is no secret named {name!r}",
            field="token_secret",
            value=name,
            remedy=f"PUT /api/v1/secrets/{name}",
            code="secret_unknown",
        )


def check_source(session: ReadSession, subject: Subject, source: Source, *, settings: Settings) -> None:
    """A base model belongs to nobody, but a secret to a tenant: the one that the operator names in X-Lorary-Tenant."""
    require_listed(source.endpoint, settings=settings)
    if source.token_secret is None:
        return
    if subject.tenant_id is None:
        raise Invalid(
            "token_secret is a tenant's, and no tenant is named",
            field="token_secret",
            value=source.token_secret,
            remedy="send X-Lorary-Tenant: <whose secret it is>, which `lorary` does with --tenant",
            code="secret_unknown",
        )
    require_secret(session, subject.tenant_id, source.token_secret)
