"""The registry's fixtures, for tests that run workers."""

from tests.registry.adapters.conftest import acme, base_model, operator, work, worker
from tests.registry.conftest import (
    admin_token,
    app,
    client,
    database,
    database_template,
    hasher,
    make_key,
    make_tenant,
    settings,
)

__all__ = [
    "acme",
    "admin_token",
    "app",
    "base_model",
    "client",
    "database",
    "database_template",
    "hasher",
    "make_key",
    "make_tenant",
    "operator",
    "settings",
    "work",
    "worker",
]
