"""The registry's fixtures, for tests that run workers."""

from tests.registry.adapters.conftest import acme, base_model, operator, work, worker
from tests.registry.conftest import (
    admin_token,
    app,
    client,
    database,
    database_template,
    database_urls,
    hasher,
    make_key,
    make_tenant,
    pytest_generate_tests,
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
    "database_urls",
    "hasher",
    "make_key",
    "make_tenant",
    "operator",
    "pytest_generate_tests",
    "settings",
    "work",
    "worker",
]
