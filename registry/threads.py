"""The threads in which requests ask the database. Few on purpose.

Python runs one thread of a process at a time. Of many that are ready each waits longer for its turn, and taking turns costs
processor time itself: with 40, which is what the framework would start, a request costs a third more of it than with 6.
Streams of bytes wait for stores and clients instead, and keep the framework's threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

DEFAULT = 8
_limiter: RunVar[CapacityLimiter] = RunVar("lorary_request_threads")  # one an event loop

P = ParamSpec("P")
T = TypeVar("T")


def limit_threads(number: int) -> None:
    """So many at once, in the event loop that calls this; `DEFAULT` where nobody does."""
    _limiter.set(CapacityLimiter(number))


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns or raises, called in one of the threads. Who finds all of them busy waits in line."""
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = CapacityLimiter(DEFAULT)
        _limiter.set(limiter)
    return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=limiter)
