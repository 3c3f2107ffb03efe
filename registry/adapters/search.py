"""Finding adapters: an inverted index of words and tags, and what a search means in SQL.

A search asks for all of its parts at once. Text is cut into words (letters and digits, case folded); each must begin a
word of the adapter's name, description or tags. A tag is asked for whole (`team:red`) or by its key (`team`). Rank and
status are of one and the same living version.

Terms are bytes, so that both databases compare them alike, whatever a server's collation is; and a range finds them by
their beginning through the primary key.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, insert, or_, select

from registry.adapters.models import PENDING, READY, REJECTED, Adapter, AdapterTerm, AdapterVersion
from registry.base_models.models import BaseModelRevision
from registry.db import WriteSession
from registry.errors import Invalid

MAX_WORD = 64
MAX_WORDS = 16
WORD, TAG = "w", "t"

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Search:
    """None and empty stand for any."""

    text: str | None = None
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    status: str | None = None
    min_rank: int | None = None
    max_rank: int | None = None


ANYTHING = Search()


def words(text: str) -> set[str]:
    """What of a text can be found: `Pirate-speak` is `pirate` and `speak`."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return {word[:MAX_WORD] for word in _WORD.findall(folded)}


def terms_of(adapter: Adapter) -> set[bytes]:
    found = words(" ".join((adapter.name, adapter.description, *adapter.tags)))
    return {_term(WORD, word) for word in found} | {_term(TAG, tag) for tag in adapter.tags}


def index(session: WriteSession, adapter: Adapter) -> None:
    """Make the index say what the adapter is now. Call where its name, description or tags were set, under its lock."""
    mine = (AdapterTerm.tenant_id == adapter.tenant_id, AdapterTerm.adapter_id == adapter.id)
    indexed, wanted = set(session.scalars(select(AdapterTerm.term).where(*mine))), terms_of(adapter)
    if gone := indexed - wanted:
        session.execute(delete(AdapterTerm).where(*mine, AdapterTerm.term.in_(gone)))
    if new := wanted - indexed:
        rows = [{"tenant_id": adapter.tenant_id, "adapter_id": adapter.id, "term": term} for term in sorted(new)]
        session.execute(insert(AdapterTerm), rows)


def matching(tenant_id: str, search: Search) -> Iterator[ColumnElement[bool]]:
    """Conditions on `Adapter`. Raises Invalid for a text without a word, or with too many."""
    for word in _words_asked(search.text):
        yield _has_term(tenant_id, _beginning(_term(WORD, word)))
    for tag in search.tags:
        yield _has_term(tenant_id, or_(AdapterTerm.term == _term(TAG, tag), _beginning(_term(TAG, tag + ":"))))
    if search.base_model is not None:
        yield Adapter.base_model_id == select(BaseModelRevision.id).where(BaseModelRevision.name == search.base_model).scalar_subquery()
    if (search.status, search.min_rank, search.max_rank) != (None, None, None):
        yield _has_version(tenant_id, search)


def _words_asked(text: str | None) -> set[str]:
    if text is None:
        return set()
    asked = words(text)
    if not 0 < len(asked) <= MAX_WORDS:
        raise Invalid(
            f"q {text!r} has {len(asked)} words, made of letters and digits; ask for 1 to {MAX_WORDS}",
            field="q",
            value=text,
            remedy="words of the adapter's name, description or tags, or their beginnings",
        )
    return asked


def _has_term(tenant_id: str, term: ColumnElement[bool]) -> ColumnElement[bool]:
    return Adapter.id.in_(select(AdapterTerm.adapter_id).where(AdapterTerm.tenant_id == tenant_id, term))


def _has_version(tenant_id: str, search: Search) -> ColumnElement[bool]:
    statuses = [PENDING, READY, REJECTED] if search.status is None else [search.status]
    conditions = [AdapterVersion.tenant_id == tenant_id, AdapterVersion.status.in_(statuses)]
    if search.min_rank is not None:
        conditions.append(AdapterVersion.rank >= search.min_rank)
    if search.max_rank is not None:
        conditions.append(AdapterVersion.rank <= search.max_rank)
    return Adapter.id.in_(select(AdapterVersion.adapter_id).where(*conditions))


def _beginning(term: bytes) -> ColumnElement[bool]:
    return and_(AdapterTerm.term >= term, AdapterTerm.term < term + b"\xff")  # no UTF-8 text holds this byte


def _term(kind: str, text: str) -> bytes:
    return (kind + text).encode()
