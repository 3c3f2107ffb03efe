"""All sealed texts of an installation, wherever they stand: which do not open, and sealing them under the newest key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from registry.db import ReadSession, WriteSession
from registry.sealing import Sealer, Unsealable
from registry.secrets import repository as secrets
from registry.secrets import service as secret_service
from registry.webhooks import repository as webhooks
from registry.webhooks import service as webhook_service
from registry.webhooks.models import WebhookEndpoint


@dataclass(frozen=True)
class SecretsReport:
    """`num_old` are sealed under a previous key; `unreadable` name those that no key opens."""

    total: int
    num_old: int
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class _Sealed:
    name: str
    text: str
    context: str
    replace: Callable[[str], None]


def examine_secrets(session: ReadSession, sealer: Sealer) -> SecretsReport:
    return _walk(session, sealer, change=False)


def reseal(session: WriteSession, sealer: Sealer) -> SecretsReport:
    """In the caller's transaction: all that open, or none."""
    return _walk(session, sealer, change=True)


def _walk(session: ReadSession, sealer: Sealer, *, change: bool) -> SecretsReport:
    total, num_old, unreadable = 0, 0, []
    for sealed in _everything(session):
        total += 1
        try:
            plaintext = sealer.open(sealed.text, context=sealed.context)
        except Unsealable:
            unreadable.append(sealed.name)
            continue
        if not sealer.is_current(sealed.text):
            num_old += 1
            if change:
                sealed.replace(sealer.seal(plaintext, context=sealed.context))
    return SecretsReport(total=total, num_old=num_old, unreadable=tuple(unreadable))


def _everything(session: ReadSession) -> Iterator[_Sealed]:
    for secret in secrets.everyones(session):
        yield _Sealed(
            name=f"secret {secret.name} of tenant {secret.tenant_id}",
            text=secret.sealed,
            context=secret_service.context(secret.tenant_id, secret.name),
            replace=partial(setattr, secret, "sealed"),
        )
    for endpoint in webhooks.everyones(session):
        yield from _signing_secrets(endpoint)


def _signing_secrets(endpoint: WebhookEndpoint) -> Iterator[_Sealed]:
    for column in ("secret", "previous_secret"):
        text: str | None = getattr(endpoint, column)
        if text is not None:
            name = f"{column} of webhook {endpoint.id} of tenant {endpoint.tenant_id}"
            yield _Sealed(name=name, text=text, context=webhook_service.context(endpoint), replace=partial(setattr, endpoint, column))
