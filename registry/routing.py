"""How endpoints run: a `def` endpoint and the end of its transaction share one trip through the thread pool.

FastAPI would make three more of them: to open the session, to close it, and to look at what the endpoint returned. Each costs
more than a query, and a wait for the interpreter's lock in front of everybody else.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from fastapi.routing import APIRoute

from registry.db import ReadSession
from registry.threads import in_thread


class Route(APIRoute):
    """The route class of every router of ours."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, in_one_thread(endpoint), **options)


def in_one_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`endpoint` as a coroutine that runs it in a thread, where its session is settled too. `async` ones are as they were."""
    if inspect.iscoroutinefunction(endpoint):
        return endpoint

    @functools.wraps(endpoint)
    async def run(**arguments: Any) -> Any:
        return await in_thread(_run, endpoint, arguments)

    return run


def _run(endpoint: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The response is made after the commit, and sent after it."""
    sessions = [value for value in arguments.values() if isinstance(value, ReadSession)]
    with ExitStack() as undo:
        for session in sessions:
            undo.callback(session.close)
        result = endpoint(**arguments)
        for session in sessions:
            session.settle()
    return result
