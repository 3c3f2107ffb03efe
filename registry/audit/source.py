"""Where a change comes from: the client's address and what it calls itself. Said once a request, kept with every event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from registry.errors import encodable

MAX_ADDRESS, MAX_USER_AGENT = 64, 256


@dataclass(frozen=True)
class Source:
    """Both are None where no request is behind the change: a worker's, the command's on the machine itself."""

    address: str | None = None
    user_agent: str | None = None


NOBODY = Source()
_source: ContextVar[Source] = ContextVar("lorary_source", default=NOBODY)


def current_source() -> Source:
    return _source.get()


@contextmanager
def coming_from(address: str | None, *, user_agent: str | None) -> Iterator[None]:
    """What happens inside the block was asked for by this client. Both texts are a stranger's: cut and made storable."""
    token = _source.set(Source(_kept(address, MAX_ADDRESS), _kept(user_agent, MAX_USER_AGENT)))
    try:
        yield
    finally:
        _source.reset(token)


def _kept(text: str | None, length: int) -> str | None:
    return encodable(text.replace("\0", ""))[:length] if text else None
