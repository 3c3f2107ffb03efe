"""Opaque cursors over a keyset (created_at, id): stable under inserts, one SQL statement a page."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, literal, tuple_

from registry.db import UtcDateTime
from registry.errors import BadRequest

DEFAULT_LIMIT = 50
MAX_LIMIT = 500

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Rows a page.")]
Cursor = Annotated[str | None, Query(max_length=512, description="`next_cursor` of the page before.")]


R = TypeVar("R")
T = TypeVar("T")
S = TypeVar("S", bound=Select[*tuple[Any, ...]])


class Page(BaseModel, Generic[T]):
    """One page of a listing. `next_cursor` is null on the last page."""

    items: list[T]
    next_cursor: str | None = None


def encode_cursor(at: dt.datetime, row_id: str) -> str:
    raw = json.dumps([at.isoformat(), row_id], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[dt.datetime, str]:
    """Raises BadRequest for anything that `encode_cursor` did not make."""
    try:
        at, row_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        moment = dt.datetime.fromisoformat(at)
        if moment.tzinfo is None or not isinstance(row_id, str):
            raise ValueError(cursor)
        moment = moment.astimezone(dt.UTC)  # years 1 and 9999 may overflow: better here than in a statement
        row_id.encode()  # a lone surrogate could not be bound either
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError) as error:
        raise BadRequest(
            "cursor is not one of ours; start again without it",
            field="cursor",
            value=cursor,
            remedy="pass next_cursor of the page before, unchanged",
        ) from error
    return moment, row_id


def decode_number(cursor: str) -> int:
    """Of a listing ordered by number, whose cursor carries it in the place of the row's id."""
    number = decode_cursor(cursor)[1]
    return int(number) if number.isdigit() and len(number) < 10 else 0


def after_cursor(statement: S, cursor: str | None, *, at: Any, row_id: Any, limit: int) -> S:
    """Newest first, one row more than `limit` so that `make_page` can tell whether another page follows."""
    if cursor is not None:
        moment, last_id = decode_cursor(cursor)
        # The type is named: bound as a plain datetime, SQLite would compare other text than it stores.
        keyset: ColumnElement[bool] = tuple_(at, row_id) < tuple_(literal(moment, UtcDateTime()), literal(last_id))
        statement = statement.where(keyset)
    return statement.order_by(at.desc(), row_id.desc()).limit(limit + 1)


def make_page(rows: Sequence[R], *, limit: int, key: Callable[[R], tuple[dt.datetime, str]], show: Callable[[R], T]) -> Page[T]:
    shown = rows[:limit]
    cursor = encode_cursor(*key(shown[-1])) if len(rows) > limit else None
    return Page(items=[show(row) for row in shown], next_cursor=cursor)
