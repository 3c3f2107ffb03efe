"""Which adapters a key may name: all of them (None), or those whose names begin with one of its prefixes.

What lies outside exists for the key as little as another tenant's: it is not found, not listed, not served. Only what
would create such an adapter is refused by name, which tells of the key's own limits and of nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, or_

Prefixes = tuple[str, ...] | None

# Whoever has one of these hears of every adapter of the tenant, or decides about all of them: a limited key cannot have them.
TENANT_WIDE_SCOPES = frozenset({"audit:read", "signing:write", "usage:read", "webhooks:write"})


def is_within(name: str, prefixes: Prefixes) -> bool:
    return prefixes is None or name.startswith(prefixes)


def covers(outer: Prefixes, inner: Collection[str] | None) -> bool:
    """Whether every name that `inner` lets through passes `outer` too."""
    return outer is None or (inner is not None and all(prefix.startswith(outer) for prefix in inner))


def name_within(column: Any, prefixes: tuple[str, ...]) -> ColumnElement[bool]:
    """`is_within` in SQL. Names are lower case, so that SQLite's LIKE, which ignores case, answers like PostgreSQL's."""
    return or_(*(column.startswith(prefix, autoescape=True) for prefix in prefixes))
